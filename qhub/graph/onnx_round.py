"""Rounding in an ONNX model: quantize and dequantize operations around tensors and weights."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto, helper

from qhub.graph.onnx_edit import Array, OnnxEditor
from qhub.graph.onnx_ops import Place
from qhub.graph.onnx_passes import store_layer
from qhub.graph.onnx_stored import StoredLayer
from qhub.graph.values import ActivationGrid

_HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def round_tensor(editor: OnnxEditor, tensor: str, grid: ActivationGrid, readers: Sequence[NodeProto]) -> None:
    """Let `readers` read the tensor rounded."""
    scale = editor.store(editor.name(f"{tensor}_scale"), np.array(grid.scale, np.float32))
    zero = editor.store(editor.name(f"{tensor}_zero"), np.array(grid.zero, np.uint8))
    codes, rounded = editor.name(f"{tensor}_codes"), editor.name(f"{tensor}_rounded")
    made = [helper.make_node("QuantizeLinear", [tensor, scale, zero], [codes])]
    if grid.bits < 8:
        bounds = [editor.store(editor.name(f"{tensor}_{end}"), np.array(value, np.uint8)) for end, value in _bounds(grid)]
        clipped = editor.name(f"{tensor}_clipped")
        made.append(helper.make_node("Clip", [codes, *bounds], [clipped]))
        codes = clipped
    made.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [rounded]))
    first = next(node for node in editor.nodes if any(node is reader for reader in readers))
    editor.insert(first, made)
    for reader in readers:
        reader.input[:] = [rounded if name == tensor else name for name in reader.input]


def _bounds(grid: ActivationGrid) -> tuple[tuple[str, int], ...]:
    return ("low", 0), ("high", (1 << grid.bits) - 1)


def round_weight(editor: OnnxEditor, place: Place, stored: StoredLayer) -> None:
    """In place of the weight: its codes, dequantized per output."""
    names = store_layer(editor, place.layer, stored, place.axis)
    rounded = editor.name(f"{place.layer}.weight_rounded")
    editor.insert(place.node, [helper.make_node("DequantizeLinear", list(names), [rounded], axis=place.axis)])
    place.node.input[1] = rounded


def cast_weight(editor: OnnxEditor, place: Place, dtype: str) -> None:
    """Store the weight in 16 bits; what is computed stays float32."""
    numbers = editor.constant(place.weight)
    assert numbers is not None
    if numbers.dtype == np.float32:
        editor.store(place.weight, numbers.astype(_HALVES[dtype]))
    wide = editor.name(f"{place.weight}_float32")
    editor.insert(place.node, [helper.make_node("Cast", [place.weight], [wide], to=TensorProto.FLOAT)])
    place.node.input[1] = wide


def replace_layer(editor: OnnxEditor, place: Place, weight: Array, bias: Array | None) -> None:
    """Give a layer another weight (N, …), and another bias (N,) if one is given."""
    stored = editor.constant(place.weight)
    assert stored is not None
    rows = weight.reshape(np.moveaxis(stored, place.axis, 0).shape).astype(stored.dtype)
    editor.store(place.weight, np.moveaxis(rows, 0, place.axis))
    if bias is not None:
        _replace_bias(editor, place, bias)


def _replace_bias(editor: OnnxEditor, place: Place, bias: Array) -> None:
    name = editor.store(editor.name(f"{place.layer}.bias"), bias.astype(np.float32))
    if place.adder is not None:
        place.adder.input[:] = [name if given == place.bias else given for given in place.adder.input]
    elif place.node.op_type == "MatMul":
        made = place.node.output[0]
        place.node.output[0] = editor.name(f"{made}_product")
        editor.insert_after(place.node, helper.make_node("Add", [place.node.output[0], name], [made]))
    else:
        place.node.input[:] = [*place.node.input[:2], name]
