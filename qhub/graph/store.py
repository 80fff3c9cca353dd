"""The QuantizedModel of a graph on disk: the program with quantize and dequantize operations, `qhub.json`, and what feeds the model.

model.pt2 or model.onnx    codes of layer X as X.weight_codes int8 (code − 2**(bits − 1)), X.weight_scale float32 (N,), X.weight_zero
qhub.json                  method, scheme, inputs, outputs, the scheme of each layer, the grid of each rounded tensor
config.json, tokenizer, preprocessing: as they came with the float model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qhub.errors import DamagedModelError, QhubError
from qhub.graph.values import GraphInput, Quantization

if TYPE_CHECKING:
    from qhub.interfaces import Graph, GraphResult
    from qhub.quantize.qtensor import QTensor

METADATA = "qhub.json"
PROGRAM, ONNX = "model.pt2", "model.onnx"
_ARTIFACTS = {"*.onnx": "onnx", "*.xml": "openvino", "*.tflite": "tflite", "*.mlpackage": "coreml", "*.engine": "tensorrt"}
#: What feeds the model, and is copied to wherever it goes.
COMPANIONS = (
    "config.json", "preprocess.json", "preprocess.yaml", "preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*",
    "merges.txt", "added_tokens.json", "1_Pooling/config.json", "modules.json",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedGraph:
    """A QuantizedModel of a graph, as its folder says; nothing is read of the program until `graph` is called."""

    folder: Path
    metadata: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> QuantizedGraph:
        """The model in `folder`.

        :raises QhubError: when there is none. :raises DamagedModelError: when its files contradict each other.
        """
        found = cls(folder, cls.described(folder))
        if not found.program.is_file():
            raise DamagedModelError(f"`{folder}` has no `{found.program.name}`", hint="quantize the model again")
        return found

    @staticmethod
    def described(folder: Path) -> Mapping[str, Any]:
        """What `qhub.json` says of the network in `folder`, a QuantizedModel or an artifact.

        :raises QhubError: when it is none.
        """
        path = folder / METADATA
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise QhubError(
                f"`{folder}` is not a model that qhub quantized: it has no readable {METADATA}", hint="`qhub run MODEL` makes one"
            ) from None
        if not isinstance(metadata, dict) or metadata.get("kind") != "graph":
            raise QhubError(f"`{folder}` is no quantized graph", hint=f"`qhub inspect {folder}` says what it is")
        return metadata

    @property
    def program(self) -> Path:
        """The file that holds the network."""
        return self.folder / str(self.metadata["file"])

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        """What the network takes."""
        return tuple(GraphInput(item["name"], tuple(item["shape"]), item["dtype"]) for item in self.metadata["inputs"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it gives."""
        return tuple(self.metadata["outputs"])

    @property
    def schemes(self) -> Mapping[str, str]:
        """Layer → scheme of its weight."""
        found: Mapping[str, str] = self.metadata["layers"]
        return found

    def graph(self) -> Graph:
        """The network, with its quantize and dequantize operations.

        :raises DamagedModelError: when the program cannot be read.
        """
        if self.program.suffix == ".onnx":
            from qhub.graph.onnx_graph import OnnxGraph

            return OnnxGraph.load(self.program, self.inputs, self.outputs)
        from qhub.graph.torch_graph import TorchGraph

        try:
            return TorchGraph.load(self.program, self.inputs, self.outputs)
        except QhubError:
            raise
        except Exception as error:  # noqa: BLE001 - what a damaged archive raises is not defined
            first = str(error).strip().partition("\n")[0]
            raise DamagedModelError(f"`{self.program}` cannot be opened: {first}", hint="quantize the model again") from None

    def layers(self) -> Mapping[str, QTensor]:
        """The codes, scales and zeros of every quantized layer."""
        return self.graph().layers(self.bits)

    @property
    def bits(self) -> dict[str, int]:
        """Layer → bits of its codes."""
        from qhub.types import Scheme

        return {layer: Scheme.parse(scheme).weight_bits for layer, scheme in self.schemes.items()}


def artifact_format(folder: Path) -> str | None:
    """The format of a network's artifact, by its files; None for a QuantizedModel and for what is no artifact."""
    if (folder / PROGRAM).exists() or folder.name == "quantized":
        return None
    return next((written for pattern, written in _ARTIFACTS.items() if any(folder.glob(pattern))), None)


def is_graph(folder: Path) -> bool:
    """Whether `folder` holds a quantized graph."""
    try:
        return bool(json.loads((folder / METADATA).read_text(encoding="utf-8")).get("kind") == "graph")
    except (OSError, ValueError, AttributeError):
        return False


def write_graph(folder: Path, rounded: Graph, quantization: Quantization, facts: Mapping[str, Any]) -> None:
    """Write the rounded network and `qhub.json` into `folder`; `facts` are method, scheme, layers, recipe digest and notes."""
    name = PROGRAM if rounded.suffix == ".pt2" else ONNX
    rounded.save(folder / name)
    metadata = {
        "format_version": 1,
        "kind": "graph",
        "file": name,
        "inputs": [asdict(item) for item in rounded.inputs],
        "outputs": list(rounded.outputs),
        "activations": {tensor: asdict(quantization.activations[tensor]) for tensor in quantization.readers},
        "dynamic": sorted(quantization.dynamic),
        "casts": dict(quantization.casts),
        **facts,
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def graph_facts(result: GraphResult, method: str, scheme: str) -> dict[str, Any]:
    """What `write_graph` is to say of a method's result."""
    from qhub.types import Scheme

    layers = [op.layer for op in result.graph.ops if op.has_weight and op.layer is not None]
    made = result.quantization
    return {
        "method": method,
        "scheme": scheme,
        "layers": {layer: str(Scheme(codes.bits)) for layer, codes in made.weights.items()},
        "float_layers": [layer for layer in dict.fromkeys(layers) if layer not in made.weights and layer not in made.casts],
        "notes": dict(result.notes),
        "sizes": _sizes(result.graph, made),
    }


def _sizes(graph: Graph, made: Quantization) -> dict[str, int]:
    """Bytes of codes as packed, of scales, and of weights in 16 bits; and how many weights are quantized."""
    codes = sum((one.bits * one.codes.numel() + 7) // 8 for one in made.weights.values())
    return {
        "weights": sum(one.codes.numel() for one in made.weights.values()),
        "codes": codes,
        "scales_and_zeros": sum(4 * one.scale.numel() for one in made.weights.values()),
        "sixteen_bit": sum(2 * graph.weight(layer).numel() for layer in made.casts),
    }


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what feeds the model from its folder (or from beside its file)."""
    beside = source if source.is_dir() else source.parent
    for pattern in COMPANIONS if source.is_dir() else ("preprocess.json", "preprocess.yaml"):
        for path in beside.glob(pattern):
            target = folder / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, target)
