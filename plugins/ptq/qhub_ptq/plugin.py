"""The `ptq` quantizer: static and dynamic INT8 and 16-bit floats, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qhub import GraphJob, GraphQuantizer, GraphResult, ModelProfile, Quantizer, Scheme, hookimpl
from qhub_ptq.options import DEFAULTS, check

STATIC = ("w8a8-static", "w4a8-static", "w4a4-static")
DYNAMIC = ("w8a8-dynamic", "w4a8-dynamic")
FLOAT16 = {"fp16": "float16", "bf16": "bfloat16"}


class Ptq(GraphQuantizer):
    """Post-training quantization.

    Options: `range` of activations (mse, minmax, percentile, entropy), `symmetric` activations, `equalize` channels of
    convolutions that follow each other, `correct_bias`, `compensate` rounding errors of weights below 8 bits, `smooth`
    (SmoothQuant's exponent), `reduce_range` of weights for x86 without VNNI. `auto`: what helps, or what the device wants.
    """

    name = "ptq"
    summary = "static and dynamic INT8, float16"
    distribution = "qhub-ptq"
    requires = ("torch",)
    families = ("static", "dynamic", "float16")
    options: ClassVar[Mapping[str, Any]] = DEFAULTS

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - plain YAML values
        super().__init__(**options)
        check(self.settings)

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Language models have methods of their own, and some schemes are none of these."""
        if profile.task == "llm":
            return "`ptq` is for networks that are no language models; for those there are `awq`, `gptq` and `rtn`"
        if str(scheme) not in (*STATIC, *DYNAMIC, *FLOAT16):
            return f"`ptq` does not write scheme `{scheme}`; it writes {', '.join((*STATIC, *DYNAMIC, *FLOAT16))}"
        return None

    def quantize_graph(self, job: GraphJob) -> GraphResult:
        """Round the graph, and take back what costs too much."""
        from qhub_ptq.quantize import quantize

        return quantize(job, self.settings)


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `ptq`."""
    return [Ptq()]
