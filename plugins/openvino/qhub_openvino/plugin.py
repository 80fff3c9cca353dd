"""The exporter and the engine `openvino`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import Artifact, Exporter, ModelProfile, OpenOptions, QuantizedModel, Recipe, Runtime, Scheme, Target, hookimpl

if TYPE_CHECKING:
    from qhub import GraphSession, QTensor, Session

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
        """Carries weight-only integer schemes of the language models that `qhub.decoder_config` describes, and networks."""
        if profile.task != "llm":
            return _why_no_network(scheme)
        from qhub_openvino.schemes import why_no_decoder, why_not

        return why_not(scheme) or why_no_decoder(Path(profile.path) / "config.json")

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Build a language model's IR, whose weights go from file to file; or convert a network's."""
        from qhub import folder_digest

        if model.kind == "graph":
            from qhub_openvino.network import export_network

            export_network(model.path, out, recipe)
        else:
            from qhub_openvino.export import export_decoder

            export_decoder(model.path, out)
        size_bytes, digest = folder_digest(out)
        return Artifact(out, self.format, size_bytes, digest)

    def read_layers(self, path: Path) -> Mapping[str, QTensor] | None:
        """Codes, scales and zeros out of the IR's constants."""
        from qhub import is_graph
        from qhub_openvino.network import network_layers

        if is_graph(path):
            return network_layers(path)
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

    def open_graph(self, path: Path, options: OpenOptions = OpenOptions()) -> GraphSession:  # noqa: B008 - frozen
        """Open a network's folder; `exact` computes in float32 what is not rounded."""
        from qhub_openvino.network_session import NetworkSession

        return NetworkSession(path, options)


def _why_no_network(scheme: Scheme) -> str | None:
    if scheme.group_size is not None:
        return f"networks as `{_FORMAT}` have one scale per output; scheme `{scheme}` has groups"
    return None


@hookimpl
def qhub_exporters() -> Sequence[Exporter]:
    """Offer `openvino`."""
    return [OpenVinoExporter()]


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `openvino`."""
    return [OpenVinoRuntime()]
