"""The exporter and the engine `openvino`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import Artifact, Exporter, ModelProfile, OpenOptions, QuantizedModel, Recipe, Runtime, Scheme, Target, hookimpl

if TYPE_CHECKING:
    from qhub import QTensor, Session

_FORMAT = "openvino"
_NEEDED = ("openvino", "numpy")


class OpenVinoExporter(Exporter):
    """A language model as OpenVINO IR with keys and values in states; weights are integer constants with the same numbers."""

    name = "openvino"
    summary = "OpenVINO IR with integer weights"
    distribution = "qhub-openvino"
    requires = _NEEDED
    format = _FORMAT

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Carries weight-only integer schemes of the language models that `qhub.decoder_config` describes."""
        if profile.task != "llm":
            return f"`{self.format}` as written here holds language models; this is `{profile.task}`"
        from qhub_openvino.schemes import why_no_decoder, why_not

        return why_not(scheme) or why_no_decoder(Path(profile.path) / "config.json")

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Build the IR; what lies in the model's files goes from there to the new one."""
        from qhub import folder_digest
        from qhub_openvino.export import export_decoder

        export_decoder(model.path, out)
        size_bytes, digest = folder_digest(out)
        return Artifact(out, self.format, size_bytes, digest)

    def read_layers(self, path: Path) -> Mapping[str, QTensor] | None:
        """Codes, scales and zeros out of the IR's constants."""
        from qhub_openvino.read import read_layers

        return read_layers(path)


class OpenVinoRuntime(Runtime):
    """OpenVINO on a CPU, or on the device that `--kernel` names; rounds activations to bfloat16 or int8 unless a session is exact."""

    name = "openvino"
    summary = "OpenVINO"
    distribution = "qhub-openvino"
    requires = _NEEDED
    formats = (_FORMAT,)
    rounds_activations = True

    def reject(self, target: Target) -> str | None:
        """Runs where there are wheels of OpenVINO, on CPUs and on Intel's accelerators."""
        if target.os not in ("linux", "macos", "windows"):
            return f"`openvino`'s Python package does not run on `{target.os}`"
        return None

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Read the IR, its weights mapped, and compile it."""
        from qhub_openvino.session import OpenVinoSession

        return OpenVinoSession(path, options)


@hookimpl
def qhub_exporters() -> Sequence[Exporter]:
    """Offer `openvino`."""
    return [OpenVinoExporter()]


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `openvino`."""
    return [OpenVinoRuntime()]
