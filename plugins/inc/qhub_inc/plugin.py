"""Intel Neural Compressor's methods: the tool quantizes the model with the recipe's tokens, qhub stores what it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qhub import ModelJob, ModelProfile, Quantizer, Scheme, WholeModel, WholeResult, hookimpl


class _Method(WholeModel):
    """What the three have in common."""

    distribution = "qhub-inc"
    requires = ("neural_compressor",)
    #: The tool's configuration class, and what is set there beside scheme and options.
    config: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """It takes language models and integer weights."""
        if profile.task not in ("llm", "unknown"):
            return f"`{self.name}` takes language models, not `{profile.task}`"
        if not scheme.is_weight_only:
            return f"`{self.name}` does not write scheme `{scheme}`"
        return None

    def quantize_model(self, job: ModelJob) -> None:
        """Let the tool work; its layers are saved unpacked, the rest as it left it."""
        from qhub_inc.tool import run

        run(job, self.config, {**self.fixed, **self.settings})

    def read_result(self, out: Path) -> WholeResult:
        """What was saved."""
        from qhub_inc.folder import UnpackedFolder

        return UnpackedFolder(out)


class Rtn(_Method):
    """Its round to nearest."""

    name = "inc-rtn"
    summary = "Intel Neural Compressor's round to nearest"
    config = "RTNConfig"
    needs = frozenset()


class Gptq(_Method):
    """Its GPTQ in the order of the columns. Options, by the tool's names: `percdamp`, `use_mse_search`.

    Its activation order cannot be stored, and its static groups fail in version 3.10 (an IndexError).
    """

    name = "inc-gptq"
    summary = "Intel Neural Compressor's GPTQ"
    config = "GPTQConfig"
    options: ClassVar[Mapping[str, Any]] = {"percdamp": 0.01, "use_mse_search": False}


class Awq(_Method):
    """Its AWQ, with scales that fold into the layer before. Options, by the tool's names: `use_auto_scale`, `use_auto_clip`."""

    name = "inc-awq"
    summary = "Intel Neural Compressor's AWQ"
    config = "AWQConfig"
    fixed: ClassVar[Mapping[str, Any]] = {"folding": True}
    options: ClassVar[Mapping[str, Any]] = {"use_auto_scale": True, "use_auto_clip": True}


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer the three methods."""
    return [Awq(), Gptq(), Rtn()]
