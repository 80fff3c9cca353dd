"""The exporters `onnx` and `onnx-qdq`, and the `onnxruntime` engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import Artifact, Exporter, ModelProfile, OpenOptions, QuantizedModel, Recipe, Runtime, Scheme, Target, hookimpl

if TYPE_CHECKING:
    from qhub import GraphSession, QTensor, Session
    from qhub_onnxruntime.linear import Quantized

_FORMAT = "onnx"
_NEEDED = ("onnx", "onnxruntime", "numpy")


class OnnxExporter(Exporter):
    """A language model as an ONNX graph with a cache of keys and values; weights are `MatMulNBits` with the same numbers."""

    name = "onnxruntime"
    summary = "ONNX folder with MatMulNBits"
    distribution = "qhub-onnxruntime"
    requires = _NEEDED
    format = _FORMAT

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Carries weight-only integer schemes of the language models that `qhub.decoder_config` describes, and networks."""
        if profile.task != "llm":
            return self._why_no_network(profile, scheme)
        from qhub_onnxruntime.schemes import why_no_decoder, why_not

        return why_not(scheme) or why_no_decoder(Path(profile.path) / "config.json")

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Build a language model's graph, streaming one layer at a time into its data file; or write a network's."""
        from qhub import folder_digest

        if model.kind == "graph":
            from qhub_onnxruntime.network import export_network

            export_network(model.path, out, recipe)
        else:
            from qhub_onnxruntime.export import export_decoder

            export_decoder(model.path, out, self._quantized())
        size_bytes, digest = folder_digest(out)
        return Artifact(out, self.format, size_bytes, digest)

    def read_layers(self, path: Path) -> Mapping[str, QTensor] | None:
        """Codes, scales and zeros out of the graph's initializers."""
        from qhub import is_graph
        from qhub_onnxruntime.network import network_layers

        if path.is_file() or is_graph(path):
            return network_layers(path)
        from qhub_onnxruntime.read import read_layers

        return read_layers(path)

    def _quantized(self) -> Quantized:
        from qhub_onnxruntime.linear import matmul_nbits

        return matmul_nbits

    def _why_no_network(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        if scheme.group_size is not None:
            return f"networks as `{self.format}` have one scale per output; scheme `{scheme}` has groups"
        return None


class QdqExporter(OnnxExporter):
    """The same with `DequantizeLinear` of int4 before each `MatMul`, which other engines read too; only if it is named."""

    name = "onnx-qdq"
    summary = "ONNX folder with int4 DequantizeLinear"
    format = "onnx-qdq"

    def _why_no_network(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        return f"`{self.format}` holds language models; this is `{profile.task}`: `onnx` has such pairs already"

    def _quantized(self) -> Quantized:
        from qhub_onnxruntime.linear import dequantize_linear

        return dequantize_linear


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU; the file's `accuracy_level` rounds activations to int8 unless a session is exact."""

    name = "onnxruntime"
    summary = "ONNX Runtime"
    distribution = "qhub-onnxruntime"
    requires = _NEEDED
    formats = (_FORMAT, QdqExporter.format)
    rounds_activations = True

    def reject(self, target: Target) -> str | None:
        """Runs where there are wheels of ONNX Runtime."""
        return None if target.os in ("linux", "macos", "windows") else f"`onnxruntime`'s Python package does not run on `{target.os}`"

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Open the graph; the data file is mapped."""
        from qhub_onnxruntime.session import OnnxSession

        return OnnxSession(path, options)

    def open_graph(self, path: Path, options: OpenOptions = OpenOptions()) -> GraphSession:  # noqa: B008 - frozen
        """Open a network's folder or file; `exact` computes between quantize and dequantize in float32.

        :raises Unsupported: when a kernel is asked for.
        """
        from qhub_onnxruntime.network_session import NetworkSession

        return NetworkSession(path, options)


@hookimpl
def qhub_exporters() -> Sequence[Exporter]:
    """Offer `onnxruntime` first: the other is for those who name it."""
    return [OnnxExporter(), QdqExporter()]


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `onnxruntime`."""
    return [OnnxRuntime()]
