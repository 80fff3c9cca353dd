"""What each node of an ONNX model is, in the words of `values.Op`; and folding what only matters for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from qhub.graph.onnx_edit import Array, OnnxEditor, attributes
from qhub.graph.values import Kind, Op

_CARRIES = (
    "MaxPool", "Reshape", "Transpose", "Slice", "Pad", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "DepthToSpace",
)  # fmt: skip
_NORMS = (
    "LayerNormalization", "Softmax", "LogSoftmax", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "LRN",
    "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "LpNormalization",
)  # fmt: skip
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("Add", "Sub", "Mul"), "join"),
    **dict.fromkeys(_CARRIES, "carry"),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), "pool"),
    **dict.fromkeys(_NORMS, "norm"),
}
_AFFINE = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's numbers are: the node that reads its `weight`, which of its axes holds the outputs, and who adds the bias."""

    node: NodeProto
    weight: str
    axis: int
    bias: str | None = None
    adder: NodeProto | None = None  # a MatMul's bias is added by another node

    @property
    def layer(self) -> str:
        """The layer's name: its weight's without `.weight`."""
        return self.weight.removesuffix(".weight")


def fold(editor: OnnxEditor) -> None:
    """Fold batch norms into the convolutions before them, transposed weights, and take out what does nothing."""
    for node in list(editor.nodes):
        if node.op_type in ("Identity", "Dropout") and node.input[0] not in editor.stored and node.output[0] not in editor.outputs:
            editor.bypass(node, node.input[0])
        elif node.op_type in ("Identity", "Transpose") and node.input[0] in editor.stored:
            numbers = editor.constant(node.input[0])
            assert numbers is not None
            _keep_as(editor, node, numbers if node.op_type == "Identity" else np.transpose(numbers, attributes(node).get("perm")))
    for node in [node for node in editor.nodes if node.op_type == "BatchNormalization"]:
        _fold_norm(editor, node)


def _keep_as(editor: OnnxEditor, node: NodeProto, numbers: Array) -> None:
    """Store what the node makes of a constant, under the constant's name if nobody else reads that."""
    name = node.input[0] if editor.readers(node.input[0]) == [node] else node.output[0]
    if node.output[0] in editor.outputs:
        return
    editor.store(name, numbers)
    editor.nodes = [other for other in editor.nodes if other is not node]
    if name != node.output[0]:
        for reader in editor.readers(node.output[0]):
            reader.input[:] = [name if given == node.output[0] else given for given in reader.input]


def _fold_norm(editor: OnnxEditor, norm: NodeProto) -> None:
    """y = (conv(x) − mean) · factor + bias is a convolution: with weight · factor, and the rest as its bias. Exact but for rounding."""
    conv = editor.maker(norm.input[0], "Conv")
    numbers = [editor.constant(name) for name in norm.input[1:5]]
    weight = None if conv is None else editor.constant(conv.input[1])
    bias = np.zeros(()) if conv is None or len(conv.input) < 3 else editor.constant(conv.input[2])
    if conv is None or weight is None or bias is None or any(value is None for value in numbers):
        return
    if len(editor.readers(norm.input[0])) != 1 or len(editor.readers(conv.input[1])) != 1 or norm.input[0] in editor.outputs:
        return
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in numbers)
    factor = gamma / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
    folded = weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    editor.store(conv.input[1], folded.astype(weight.dtype))
    name = editor.store(editor.name(f"{conv.input[1].removesuffix('.weight')}.bias"), ((bias - mean) * factor + beta).astype(weight.dtype))
    conv.input[:] = [conv.input[0], conv.input[1], name]
    conv.output[0] = norm.output[0]
    editor.nodes = [node for node in editor.nodes if node is not norm]
    editor.made_by(conv)


def places(editor: OnnxEditor) -> dict[str, Place]:
    """Tensor → the layer that makes it, for every product with a stored weight."""
    found = {}
    for node in editor.nodes:
        place = _place(editor, node)
        if place is not None:
            found[(place.adder or node).output[0]] = place
    return found


def _place(editor: OnnxEditor, node: NodeProto) -> Place | None:
    weight = editor.stored.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or weight.data_type != 1 or node.input[0] in editor.stored:
        return None
    about = attributes(node)
    bias = node.input[2] if len(node.input) > 2 and node.input[2] in editor.stored else None
    if node.op_type == "Conv":
        return Place(node, node.input[1], 0, bias)
    if node.op_type == "ConvTranspose" and about.get("group", 1) == 1:
        return Place(node, node.input[1], 1, bias)
    if node.op_type == "Gemm" and not about.get("transA") and about.get("alpha", 1.0) == 1.0 == about.get("beta", 1.0):
        plain = len(node.input) < 3 or (bias is not None and len(editor.stored[bias].dims) == 1)
        return Place(node, node.input[1], 0 if about.get("transB") else 1, bias) if plain else None
    if node.op_type == "MatMul" and len(weight.dims) == 2:
        return _with_adder(editor, node, weight.dims[1])
    return None


def _with_adder(editor: OnnxEditor, node: NodeProto, outputs: int) -> Place:
    """A MatMul with the Add of its bias, where one follows."""
    readers = editor.readers(node.output[0])
    if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] not in editor.outputs:
        other = [name for name in readers[0].input if name != node.output[0]]
        if len(other) == 1 and other[0] in editor.stored and list(editor.stored[other[0]].dims) == [outputs]:
            return Place(node, node.input[1], 1, other[0], readers[0])
    return Place(node, node.input[1], 1)


def operations(editor: OnnxEditor, found: Mapping[str, Place], inputs: tuple[str, ...]) -> tuple[Op, ...]:
    """The operations that depend on the network's inputs, in execution order; what only depends on their shapes is none."""
    live, made = set(inputs), []
    inner = {id(place.node) for place in found.values() if place.adder is not None}
    for node in editor.nodes:
        sources = tuple(dict.fromkeys(name for name in node.input if name in live))
        if not sources or node.op_type in ("Shape", "Size"):
            continue
        live.update(node.output)
        if id(node) not in inner:  # a MatMul is part of the Add after it
            made.append(_operation(editor, node, found.get(node.output[0]), sources))
    return tuple(made)


def _operation(editor: OnnxEditor, node: NodeProto, place: Place | None, sources: tuple[str, ...]) -> Op:
    name = node.output[0]
    if place is not None:
        is_conv = place.node.op_type in ("Conv", "ConvTranspose")
        return Op(name, "conv" if is_conv else "linear", (place.node.input[0],), place.layer, 1 if is_conv else -1)
    if node.op_type in ("Relu", "Clip"):
        low, high = (0.0, None) if node.op_type == "Relu" else _bounds(editor, node)
        return Op(name, "clip" if low is not None and low <= 0 else "other", sources, low=low, high=high)
    kind = _KINDS.get(node.op_type, "other")
    if node.op_type == "Pad" and not _pads_with_zero(editor, node):
        kind = "other"
    if node.op_type == "ReduceMean" and _is_spatial(editor, node):
        kind = "pool"
    affine = node.op_type in _AFFINE and len(node.input) > 1 and node.input[1] in editor.stored
    return Op(name, kind, sources, node.input[1].removesuffix(".weight") if affine else None)


def _bounds(editor: OnnxEditor, node: NodeProto) -> tuple[float | None, float | None]:
    values = [editor.constant(name) if name else None for name in (*node.input[1:3], "", "")[:2]]
    low, high = (None if value is None else float(value) for value in values)
    return low, high


def _pads_with_zero(editor: OnnxEditor, node: NodeProto) -> bool:
    value = editor.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    return attributes(node).get("mode", b"constant") == b"constant" and value is not None and not value.any()


def _is_spatial(editor: OnnxEditor, node: NodeProto) -> bool:
    axes = editor.constant(node.input[1]) if len(node.input) > 1 else np.asarray(attributes(node).get("axes", ()))
    return axes is not None and sorted(np.atleast_1d(axes).tolist()) in ([2, 3], [-2, -1])
