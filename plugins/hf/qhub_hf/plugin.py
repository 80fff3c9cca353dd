"""The `hf` exporters (compressed-tensors, AWQ and GPTQ folders for transformers and vLLM) and the `hf` runtime (transformers)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qhub import Artifact, Exporter, ModelProfile, OpenOptions, QuantizedModel, Recipe, Runtime, Scheme, Target, Unsupported, hookimpl

if TYPE_CHECKING:
    from qhub import Session

FORMAT = "compressed-tensors"


class HfExporter(Exporter):
    """A QuantizedModel of weights already is such a folder: the export links its files, so it takes no more disk."""

    name = "hf"
    summary = "compressed-tensors folder for transformers and vLLM"
    distribution = "qhub-hf"
    format = FORMAT

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Carries every weight-only integer scheme of a language model exactly."""
        if profile.task != "llm":
            return f"`{FORMAT}` folders hold language models; this is `{profile.task}`"
        return None if scheme.is_weight_only else f"`{FORMAT}` as written here does not carry scheme `{scheme}`"

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Link (or copy, where links do not work) the folder's files."""
        from qhub import folder_digest

        for path in sorted(model.path.iterdir()):
            try:
                os.link(path, out / path.name)
            except OSError:
                shutil.copyfile(path, out / path.name)
        size_bytes, digest = folder_digest(out)
        return Artifact(out, self.format, size_bytes, digest)


class LayoutExporter(Exporter):
    """The same codes, scales and zeros in another layout; only chosen when it is named (`--plugin hf-awq`).

    What is refused here before anything is spent is refused again, with what the numbers say, while it writes.
    """

    distribution = "qhub-hf"
    requires = ("torch", "transformers")
    #: Bits that the layout has, and what numbers of outputs and inputs have to be multiples of.
    bits: ClassVar[tuple[int, ...]]
    multiples: ClassVar[tuple[int, int]]

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Carries weight-only integer schemes of language models, at the layout's bits, where layers fill its words."""
        if profile.task != "llm":
            return f"`{self.format}` folders hold language models; this is `{profile.task}`"
        if not scheme.is_weight_only or scheme.weight_bits not in self.bits:
            return f"`{self.format}` has {', '.join(map(str, self.bits))} bits; it does not carry scheme `{scheme}`"
        outputs, inputs = self.multiples
        for layer in profile.linears():
            rows, columns = layer.shape[0], layer.shape[-1]
            quantized = columns % (scheme.group_size or columns) == 0  # the others stay float
            if quantized and (rows % outputs or columns % inputs):
                return f"`{self.format}` needs multiples of {outputs} outputs and {inputs} inputs; `{layer.name}` is {rows} × {columns}"
        return None

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Write the folder, block by block, and read it back."""
        from qhub import folder_digest, write_layout

        write_layout(model.path, out, self.format)
        size_bytes, digest = folder_digest(out)
        return Artifact(out, self.format, size_bytes, digest)


class AwqExporter(LayoutExporter):
    """AutoAWQ's GEMM version: vLLM, SGLang, TensorRT-LLM, LMDeploy; transformers with GPTQModel."""

    name = "hf-awq"
    summary = "AutoAWQ GEMM folder, 4 bit"
    format = "awq"
    bits = (4,)
    multiples = (8, 1)


class GptqExporter(LayoutExporter):
    """GPTQ v1, which stores zero − 1: vLLM, SGLang, ExLlama; GPTQModel takes symmetric ones only."""

    name = "hf-gptq"
    summary = "GPTQ v1 folder"
    format = "gptq"
    bits = (2, 3, 4, 8)
    multiples = (32, 32)


class GptqV2Exporter(GptqExporter):
    """GPTQ v2, which stores the zero itself: GPTQModel, vLLM."""

    name = "hf-gptq-v2"
    summary = "GPTQ v2 folder"
    format = "gptq_v2"


class HfRuntime(Runtime):
    """transformers, through the public compressed-tensors package; it expands the weights when they are first used."""

    name = "hf"
    summary = "transformers"
    distribution = "qhub-hf"
    requires = ("torch", "transformers", "compressed_tensors")
    formats = (FORMAT,)

    def reject(self, target: Target) -> str | None:
        """Runs wherever Python with torch runs."""
        return None if target.os in ("linux", "macos", "windows") else f"transformers does not run on `{target.os}`"

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Load the folder as any user of transformers would; `threads` are torch's, of the whole process.

        :raises Unsupported: when a kernel is asked for: torch chooses its own.
        """
        if options.kernel is not None:
            raise Unsupported(f"`hf` has no kernel `{options.kernel}`: torch chooses its own", hint="leave out `--kernel`")
        from qhub_hf.session import HfSession

        return HfSession(path, options)


@hookimpl
def qhub_exporters() -> Sequence[Exporter]:
    """Offer `hf` first: the others are for those who name them."""
    return [HfExporter(), AwqExporter(), GptqExporter(), GptqV2Exporter()]


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `hf`."""
    return [HfRuntime()]
