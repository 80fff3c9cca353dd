"""The `hf` exporter (compressed-tensors folder for transformers and vLLM) and the `hf` runtime (transformers)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import Artifact, Exporter, ModelProfile, QuantizedModel, Recipe, Runtime, Scheme, Target, hookimpl

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

    def open(self, path: Path) -> Session:
        """Load the folder as any user of transformers would."""
        from qhub_hf.session import HfSession

        return HfSession(path)


@hookimpl
def qhub_exporters() -> Sequence[Exporter]:
    """Offer `hf`."""
    return [HfExporter()]


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `hf`."""
    return [HfRuntime()]
