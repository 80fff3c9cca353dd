"""The `qat` quantizer: quantization-aware training with learned step sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qhub import GraphJob, GraphQuantizer, GraphResult, ModelProfile, Quantizer, Scheme, hookimpl
from qhub_qat.options import DEFAULTS, Settings

SCHEMES = ("w8a8-static", "w4a8-static", "w4a4-static")


class Qat(GraphQuantizer):
    """Quantization-aware training.

    Options: `epochs` and `lr` of the first round (0: by the bits), `rounds` at most until the drop is within the goal, `batch` items
    per step, `labels` the share of the cross-entropy beside the distillation, `augment` pictures (auto, off), `edges` the bits of the
    first and the last layer (int8, same), `patience` epochs without gain before a round ends, `held` the share of items held back.
    """

    name = "qat"
    summary = "quantization-aware training: learned step sizes, distilled from the float network"
    distribution = "qhub-qat"
    requires = ("torch",)
    family = "qat"
    samples = 50_000
    options: ClassVar[Mapping[str, Any]] = DEFAULTS

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - plain YAML values
        super().__init__(**options)
        Settings.of(self.settings)

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Training needs a program: an ONNX file is none, and language models are trained elsewhere."""
        if profile.task == "llm":
            return "`qat` is for networks that are no language models; for those there are `awq`, `gptq` and `rtn`"
        if profile.format == "onnx":
            return "`qat` trains programs and modules; an ONNX file cannot be trained: give the model it was made from, or use `ptq`"
        return None if str(scheme) in SCHEMES else f"`qat` does not write scheme `{scheme}`; it writes {', '.join(SCHEMES)}"

    def quantize_graph(self, job: GraphJob) -> GraphResult:
        """Train the network with its weights and tensors rounded."""
        from qhub_qat.quantize import quantize

        return quantize(job, Settings.of(self.settings))


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `qat`."""
    return [Qat()]
