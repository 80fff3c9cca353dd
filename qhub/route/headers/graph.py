"""A network as a graph of operators with stored tensors (what ONNX and TFLite files hold) → `ModelProfile`.

What a stored tensor is follows from the operator that reads it, not from its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from qhub.route.layers import block_names, block_of, main_dtype
from qhub.types import LayerShape, ModelProfile, Task

#: Operator → {input: what it holds}; "(K, N)" marks matrices that are stored turned.
_READS: Mapping[str, Mapping[int, str]] = {
    "Conv": {1: "conv", 2: "other"}, "ConvTranspose": {1: "conv", 2: "other"},
    "ConvInteger": {1: "conv"}, "QLinearConv": {3: "conv", 8: "other"},
    "CONV_2D": {1: "conv", 2: "other"}, "DEPTHWISE_CONV_2D": {1: "conv", 2: "other"}, "TRANSPOSE_CONV": {1: "conv", 3: "other"},
    "CONV_3D": {1: "conv", 2: "other"},
    "MatMul": {0: "(K, N)", 1: "(K, N)"}, "MatMulInteger": {1: "(K, N)"}, "QLinearMatMul": {3: "(K, N)"}, "Gemm": {1: "(K, N)", 2: "other"},
    "Gemm transB": {1: "linear", 2: "other"}, "QGemm": {3: "(K, N)"}, "QGemm transB": {3: "linear"}, "MatMulNBits": {1: "linear"},
    "FULLY_CONNECTED": {1: "linear", 2: "other"}, "BATCH_MATMUL": {1: "(K, N)"},
    "Gather": {0: "embedding"}, "GATHER": {0: "embedding"}, "EMBEDDING_LOOKUP": {1: "embedding"}, "GatherBlockQuantized": {0: "embedding"},
    "BatchNormalization": {1: "norm", 2: "norm"}, "LayerNormalization": {1: "norm", 2: "norm"},
    "SimplifiedLayerNormalization": {1: "norm"}, "SkipSimplifiedLayerNormalization": {2: "norm"}, "RMSNormalization": {1: "norm"},
    "InstanceNormalization": {1: "norm", 2: "norm"}, "GroupNormalization": {1: "norm", 2: "norm"},
}  # fmt: skip
#: Operators through which a stored tensor stays what it is, and their other inputs: scales and zeros, which are no parameters.
_PASS = {"DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose", "DEQUANTIZE", "QUANTIZE"}
_SCALES: Mapping[str, tuple[int, ...]] = {
    "DequantizeLinear": (1, 2), "QuantizeLinear": (1, 2), "QLinearConv": (1, 2, 4, 5, 6, 7), "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8), "QGemm transB": (1, 2, 4, 5, 7, 8), "MatMulNBits": (2, 3, 4), "MatMulInteger": (2, 3),
    "ConvInteger": (2, 3), "GatherBlockQuantized": (2, 3), "BatchNormalization": (3, 4),
}  # fmt: skip
_INTEGERS = ("int64", "int32", "bool", "string", "uint64", "uint32")
_PICTURE_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that the file holds; `shape` as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Node:
    """An operator; `matrix` is (N, K) where its attributes say so, because the matrix is stored packed."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    matrix: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """A network. `inputs` and `outputs` map names to shapes, -1 where a size is free. Values are named as nodes name them."""

    stored: Mapping[str, Stored]
    nodes: Sequence[Node]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Role:
    kind: str
    node: Node
    turned: bool


def profile_graph(path: Path, graph: Graph, file_format: str, quantization: str | None) -> ModelProfile:
    """Profile a network; `quantization` is what its format says about it."""
    layers = tuple(_layers(graph))
    return ModelProfile(
        source=path.name,
        path=str(path),
        task=task_of_graph(graph, layers),
        architecture="unknown",
        parameters=sum(prod(layer.shape) for layer in layers),
        dtype=main_dtype(layers),
        weight_bytes=sum(stored.bytes for stored in graph.stored.values()),
        layers=layers,
        blocks=len(block_names(layer.name for layer in layers if layer.kind == "linear")) or None,
        quantization=quantization,
        format=file_format,
    )


def _layers(graph: Graph) -> Iterator[LayerShape]:
    origin = _origins(graph)
    roles, scales = _roles(graph, origin)
    ends = set(graph.outputs)
    for key, stored in graph.stored.items():
        role = roles.get(key)
        if role is None:  # integers say where and how, and numbers without a shape are constants of a formula
            if key not in scales and stored.dtype not in _INTEGERS and stored.shape:
                yield LayerShape(stored.name, "norm" if _is_norm(stored.name) else "other", stored.shape, stored.dtype, stored.bytes)
        elif not (role.kind == "embedding" and stored.dtype in _INTEGERS):
            yield _layer(stored, role, ends=bool(ends & set(role.node.outputs)))


def _layer(stored: Stored, role: _Role, *, ends: bool) -> LayerShape:
    name = _module(stored.name, role.node.name)
    shape, kind = stored.shape, role.kind
    if role.node.matrix is not None:
        shape = role.node.matrix
    elif role.turned and len(shape) == 2:
        shape = (shape[1], shape[0])
    if kind == "linear":
        kind = "other" if len(shape) < 2 else "head" if ends else "linear"
    elif kind == "embedding" and len(shape) != 2:
        kind = "other"
    return LayerShape(name, kind, shape, stored.dtype, stored.bytes, block_of(name))


def _module(stored: str, node: str) -> str:
    """The name that the exporter's source had: that of the tensor, else that of the operator (`/layers.0/fc/MatMul`)."""
    if "." in stored or "/" not in node:
        return stored
    return ".".join(part for part in node.split("/")[:-1] if part) + ".weight"


def _is_norm(name: str) -> bool:
    return "norm" in name.lower().rsplit("/", 1)[-1]


def _origins(graph: Graph) -> dict[str, tuple[str, bool]]:
    """Value → (the stored tensor that it is, whether it was transposed on the way)."""
    found = {name: (name, False) for name in graph.stored}
    for node in graph.nodes:  # in the order of execution
        if node.op in _PASS and node.inputs and node.outputs and node.inputs[0] in found:
            name, turned = found[node.inputs[0]]
            found[node.outputs[0]] = (name, turned != (node.op == "Transpose"))
    return found


def _roles(graph: Graph, origin: Mapping[str, tuple[str, bool]]) -> tuple[dict[str, _Role], set[str]]:
    roles: dict[str, _Role] = {}
    scales: set[str] = set()
    for node in graph.nodes:
        scales.update(node.inputs[place] for place in _SCALES.get(node.op, ()) if place < len(node.inputs))
        for place, kind in _READS.get(node.op, {}).items():
            if place < len(node.inputs) and node.inputs[place] in origin:
                name, turned = origin[node.inputs[place]]
                stored_turned = (kind == "(K, N)") != turned
                role = _Role("linear" if kind == "(K, N)" else kind, node, stored_turned)
                roles[name] = replace(role, turned=role.turned and role.kind == "linear")
    return roles, scales - set(roles)


def task_of_graph(graph: Graph, layers: Sequence[LayerShape]) -> Task:
    """What the network is for, as far as its inputs and outputs say; "unknown" where they leave it open."""
    inputs, outputs = set(graph.inputs), set(graph.outputs)
    if inputs & {"input_ids", "tokens"}:
        return _task_of_text(graph)
    if "input_features" in inputs:
        return "speech"
    if {"sample", "timestep"} <= inputs:
        return "generative"
    if {"pred_boxes", "boxes"} & outputs:
        return "detection"
    if any(name.startswith(("past_key_values", "past_key")) for name in inputs):
        return "llm"
    seen = any(_is_picture(shape) for shape in graph.inputs.values())
    return "vision" if "pixel_values" in inputs or (seen and _is_convolutional(layers)) else "unknown"


def _task_of_text(graph: Graph) -> Task:
    """With a cache of keys it writes text; without, token-wise logits may be an encoder's or a decoder's."""
    names = [*graph.inputs, *graph.outputs]
    if any(name.startswith(("past_key", "present")) for name in names):
        return "llm"
    if {"sentence_embedding", "pooled_embedding"} & set(graph.outputs):
        return "embedding"
    logits = graph.outputs.get("logits")
    return "unknown" if logits is None or len(logits) != 2 else "nlp"


def _is_picture(shape: Sequence[int]) -> bool:
    """(batch, 3, H, W) or (batch, H, W, 3): fewer channels may as well be sound."""
    return len(shape) == 4 and _PICTURE_CHANNELS in (shape[1], shape[3])


def _is_convolutional(layers: Sequence[LayerShape]) -> bool:
    counts = Counter(layer.kind for layer in layers)
    return counts["conv"] > counts["linear"] + counts["head"]
