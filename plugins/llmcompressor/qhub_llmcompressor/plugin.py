"""llm-compressor's methods: the tool quantizes the model with the recipe's tokens, qhub stores what it made and judges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qhub import ModelJob, ModelProfile, Quantizer, Scheme, WholeModel, WholeResult, hookimpl

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


class _Method(WholeModel):
    """What the four have in common; `modifiers` is what the tool calls a recipe."""

    distribution = "qhub-llmcompressor"
    requires = ("llmcompressor", "compressed_tensors")

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """It takes language models and integer weights."""
        if profile.task not in ("llm", "unknown"):
            return f"`{self.name}` takes language models, not `{profile.task}`"
        if not scheme.is_weight_only:
            return f"`{self.name}` does not write scheme `{scheme}`"
        return None

    def quantize_model(self, job: ModelJob) -> None:
        """Let llm-compressor work and save its compressed folder."""
        from qhub_llmcompressor.tool import run

        run(job, self.modifiers)

    def read_result(self, out: Path) -> WholeResult:
        """The compressed folder, tensor by tensor."""
        from qhub_llmcompressor.folder import CompressedFolder

        return CompressedFolder(out)

    def modifiers(self, targets: Mapping[str, Any], job: ModelJob) -> list[Modifier]:
        """The tool's recipe; `targets` says which layers at which scheme."""
        raise NotImplementedError


class Gptq(_Method):
    """Its GPTQ. Options: `damping` (the tool's `dampening_frac`)."""

    name = "llmcompressor-gptq"
    summary = "llm-compressor's GPTQ, with its static activation order"
    options: ClassVar[Mapping[str, Any]] = {"damping": 0.01}

    def modifiers(self, targets: Mapping[str, Any], job: ModelJob) -> list[Modifier]:
        """GPTQModifier."""
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**targets, dampening_frac=float(self.settings["damping"]))]


class Awq(_Method):
    """Its AWQ. Options: `duo_scaling` (true, false or "both")."""

    name = "llmcompressor-awq"
    summary = "llm-compressor's AWQ, rounded to nearest after its scales"
    options: ClassVar[Mapping[str, Any]] = {"duo_scaling": True}

    def modifiers(self, targets: Mapping[str, Any], job: ModelJob) -> list[Modifier]:
        """AWQModifier for the scales, then QuantizationModifier."""
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        from qhub_llmcompressor.tool import awq_mappings

        scaling = AWQModifier(mappings=awq_mappings(job), duo_scaling=self.settings["duo_scaling"])
        return [scaling, QuantizationModifier(**targets)]


class AutoRound(_Method):
    """Its AutoRound. Options: `iterations` per block, `batch_size` in samples."""

    name = "llmcompressor-autoround"
    summary = "llm-compressor's AutoRound: rounding and ranges learnt by signed gradients"
    options: ClassVar[Mapping[str, Any]] = {"iterations": 200, "batch_size": 8}

    def modifiers(self, targets: Mapping[str, Any], job: ModelJob) -> list[Modifier]:
        """AutoRoundModifier, without torch.compile: that needs a compiler and a minute per form of block."""
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        iterations, batch_size = int(self.settings["iterations"]), int(self.settings["batch_size"])
        return [AutoRoundModifier(**targets, iters=iterations, batch_size=batch_size, enable_torch_compile=False)]


class Rtn(_Method):
    """Its round to nearest between minimum and maximum."""

    name = "llmcompressor-rtn"
    summary = "llm-compressor's round to nearest"
    needs = frozenset()

    def modifiers(self, targets: Mapping[str, Any], job: ModelJob) -> list[Modifier]:
        """QuantizationModifier."""
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [QuantizationModifier(**targets)]


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer the four methods."""
    return [Awq(), Gptq(), AutoRound(), Rtn()]
