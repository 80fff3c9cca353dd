"""What is done to a network's IR after the frontend read it: the forms that OpenVINO computes in integers, with the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub_openvino.vendor import ops, ov

_MOVES = ("Slice", "StridedSlice", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Gather")
_HALVES = {"float16": ov.Type.f16, "bfloat16": ov.Type.bf16}
_FEW = 16  # numbers, of which none is worth a conversion


def lower(model: ov.Model, cast: str | None) -> None:
    """Rewrite the model in place; `cast` says in which 16 bits weights are stored whose numbers those hold."""
    _fold_shapes(model)
    _drop_zeros(model)
    _fold_pairs(model)
    _drop_repeated(model)
    if cast is not None:
        _narrow(model, _HALVES[cast])
    model.validate_nodes_and_infer_types()


def _of(model: ov.Model, *kinds: str) -> list[ov.Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in kinds]


def _source(node: ov.Node, index: int = 0) -> ov.Node:
    return node.input_value(index).get_node()


def _replace(node: ov.Node, other: ov.Output) -> None:
    """All who read `node` read `other`; what the network gives keeps its name."""
    other.add_names(node.output(0).get_names())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(other)


def _constant(node: ov.Node) -> NDArray[Any] | None:
    """The numbers of a constant, converted perhaps."""
    node = _source(node) if node.get_type_name() == "Convert" else node
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def _fold_shapes(model: ov.Model) -> None:
    """A constant of floats that is only given another shape is a constant of that shape."""
    for node in _of(model, "Reshape"):
        stored, shape = _source(node), node.output(0).partial_shape
        if stored.get_type_name() == "Constant" and stored.get_element_type() == ov.Type.f32 and shape.is_static:
            made = ops.constant(np.array(stored.data).reshape(list(node.output(0).shape)))
            made.set_friendly_name(stored.get_friendly_name())
            _replace(node, made.output(0))


def _drop_zeros(model: ov.Model) -> None:
    """A zero of 0 need not be subtracted from codes."""
    for node in _of(model, "Subtract"):
        zero = _source(node, 1)
        zeros = _constant(_source(zero) if zero.get_type_name() == "Reshape" else zero)
        if _constant(_source(node)) is not None and zeros is not None and not zeros.any():
            _replace(node, node.input_value(0))


def _fold_pairs(model: ov.Model) -> None:
    """Quantizing and dequantizing on one grid is one `FakeQuantize`, for all who read it."""
    made: dict[str, ov.Output] = {}
    for node in _of(model, "Multiply"):
        rounding = _quantized(node)
        if rounding is None:
            continue
        name = rounding.get_friendly_name()
        if name not in made:
            bounds = [rounding.input_value(index) for index in (1, 2, 1, 2)]
            made[name] = ops.fake_quantize(rounding.input_value(0), *bounds, rounding.get_attributes()["levels"]).output(0)
            made[name].get_node().set_friendly_name(f"{name}.rounded")
        _replace(node, made[name])


def _quantized(scaled: ov.Node) -> ov.Node | None:
    """The `FakeQuantize` to codes that `scaled` makes numbers of again, if it is on the same grid."""
    scale, inner, zero = _constant(_source(scaled, 1)), _source(scaled), np.zeros(())
    if inner.get_type_name() == "Subtract":
        found = _constant(_source(inner, 1))
        inner, zero = _source(inner), found if found is not None else np.full((), np.nan)
    for _ in range(2):
        if inner.get_type_name() != "Convert":
            return None
        inner = _source(inner)
    if inner.get_type_name() != "FakeQuantize" or scale is None or scale.size != 1 or zero.size != 1:
        return None
    low, high, first, last = (np.array(_source(inner, index).data, dtype=np.float64).item() for index in range(1, 5))
    wanted = [(code - float(zero.item())) * float(scale.item()) for code in (first, last)]
    return inner if np.allclose([low, high], wanted, rtol=1e-6, atol=0) else None


def _drop_repeated(model: ov.Model) -> None:
    """Rounding on a grid what is moved, and was rounded on that grid, changes nothing."""
    for node in _of(model, "FakeQuantize"):
        before = _source(node)
        while before.get_type_name() in _MOVES and (before.get_type_name() != "Pad" or _pads_with_zero(before)):
            before = _source(before)
        if before.get_type_name() == "FakeQuantize" and _grid(before) == _grid(node):
            _replace(node, node.input_value(0))


def _pads_with_zero(pad: ov.Node) -> bool:
    value = _constant(_source(pad, 3)) if pad.get_input_size() > 3 else np.zeros(())
    return pad.get_attributes().get("pad_mode") == "constant" and value is not None and not value.any()


def _grid(node: ov.Node) -> tuple[object, ...]:
    return (node.get_attributes()["levels"], *(tuple(np.array(_source(node, index).data).reshape(-1)) for index in range(1, 5)))


def _narrow(model: ov.Model, kind: ov.Type) -> None:
    """Constants whose numbers 16 bits hold are stored so."""
    for node in _of(model, "Constant"):
        if node.get_element_type() != ov.Type.f32 or int(np.prod(list(node.shape))) < _FEW:
            continue
        numbers = np.array(node.data)
        small = _rounded(numbers, kind)
        if small is None:
            continue
        shape = ov.Shape(list(node.shape))
        held = ov.Tensor(kind, shape)  # memory of its own, which the constant shares
        held.copy_from(ov.Tensor(small, shape, kind))
        stored = ops.constant(held, shared_memory=True)
        stored.set_friendly_name(node.get_friendly_name())
        _replace(node, ops.convert(stored, "f32").output(0))


def _rounded(numbers: NDArray[np.float32], kind: ov.Type) -> NDArray[np.uint8] | None:
    """The bytes of the numbers in 16 bits, None if those do not hold them."""
    if kind == ov.Type.bf16:
        bits = np.ascontiguousarray(numbers).reshape(-1).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16).view(np.uint8) if not (bits & np.uint32(0xFFFF)).any() else None
    with np.errstate(over="ignore"):
        small = numbers.astype(np.float16)
    return small.reshape(-1).view(np.uint8) if (small.astype(np.float32) == numbers).all() else None
