"""ONNX: the protobuf wire format of `onnx.proto`, walked without its payloads. Weights may lie in files beside (external data)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from qhub.errors import QhubError
from qhub.route.headers.graph import Graph, Node, Stored, profile_graph
from qhub.route.headers.reader import Reader, opened
from qhub.types import ModelProfile

#: TensorProto.DataType → (our name, bits of one number); a string has no size.
_DTYPES: Mapping[int, tuple[str, int]] = {
    1: ("fp32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32), 7: ("int64", 64),
    8: ("string", 0), 9: ("bool", 8), 10: ("fp16", 16), 11: ("fp64", 64), 12: ("uint32", 32), 13: ("uint64", 64), 14: ("complex64", 64),
    15: ("complex128", 128), 16: ("bf16", 16), 17: ("fp8", 8), 18: ("fp8", 8), 19: ("fp8", 8), 20: ("fp8", 8), 21: ("uint4", 4),
    22: ("int4", 4), 23: ("fp4", 4), 24: ("fp8", 8),
}  # fmt: skip
#: Fields of a TensorProto that hold numbers → the least bytes of one entry.
_TYPED = {4: 4, 5: 1, 6: 1, 7: 1, 10: 8, 11: 1}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH, _MAX_RANK = 24, 16
_QOPERATORS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm", "QLinearAdd"}


@dataclass(slots=True)
class _Parts:
    """What was found so far, of the main graph and of those inside its operators."""

    stored: dict[str, Stored] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    producer: str = ""


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message: a number (`start` and `end` are then -1), or bytes from `start` to `end`."""

    number: int
    value: int
    start: int
    end: int


def profile_onnx(path: Path) -> ModelProfile:
    """Profile an ONNX model.

    :raises DamagedModelError: when it is truncated or lies about sizes. :raises QhubError: when external data is missing.
    """
    parts = _Parts()
    with opened(path, "ONNX") as reader:
        graphs = 0
        for item in _fields(reader, 0, reader.file_bytes):
            if item.number == 7:
                graphs += 1
                _graph(reader, item, parts, 0)
        if graphs != 1:
            raise reader.broken(f"it holds `{graphs}` graphs")
    inputs = {name: shape for name, shape in parts.inputs.items() if name not in parts.stored}
    graph = Graph(parts.stored, parts.nodes, inputs, parts.outputs)
    return profile_graph(path, graph, "onnx", _quantization(parts.nodes))


def _quantization(nodes: list[Node]) -> str | None:
    ops = {node.op for node in nodes}
    if ops & {"MatMulNBits", "GatherBlockQuantized", "MatMulBnb4"}:
        return "onnx MatMulNBits"
    if ops & _QOPERATORS:
        return "onnx QOperator"
    return "onnx QDQ" if "DequantizeLinear" in ops else None


def _fields(reader: Reader, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two bytes; a payload is passed over, not read."""
    position = start
    while position < end:
        reader.seek(position)
        key = _varint(reader, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise reader.broken(f"a field at byte `{position}` has number 0")
        if wire == _VARINT:
            value = _varint(reader, end)
            position = reader.position
            yield _Field(number, value, -1, -1)
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if size is None:
            if wire != _BYTES:
                raise reader.broken(f"a field at byte `{position}` has unknown type `{wire}`")
            size = _varint(reader, end)
        begin = reader.position
        if size > end - begin:
            raise reader.broken(f"a field at byte `{position}` claims `{size}` bytes where `{end - begin}` are left (truncated?)")
        position = begin + size
        yield _Field(number, 0, begin, position)


def _varint(reader: Reader, end: int) -> int:
    value = 0
    for shift in range(0, 70, 7):
        if reader.position >= end:
            raise reader.broken(f"it ends within a number at byte `{end}` (truncated?)")
        byte = reader.u8()
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1
    raise reader.broken(f"a number at byte `{reader.position}` has no end")


def _text(reader: Reader, item: _Field) -> str:
    reader.seek(item.start)
    return reader.text(item.end - item.start)


def _graph(reader: Reader, graph: _Field, parts: _Parts, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise reader.broken(f"graphs lie within graphs deeper than `{_MAX_DEPTH}`")
    for item in _fields(reader, graph.start, graph.end):
        if item.number == 1:
            _node(reader, item, parts, depth)
        elif item.number == 5:
            tensor = _tensor(reader, item)
            parts.stored[tensor.name] = tensor
        elif item.number in (11, 12) and depth == 0:
            name, shape = _value_info(reader, item)
            (parts.inputs if item.number == 11 else parts.outputs)[name] = shape


def _node(reader: Reader, node: _Field, parts: _Parts, depth: int) -> None:
    inputs, outputs, texts = [], [], {3: "", 4: ""}
    numbers: dict[str, int] = {}
    value: Stored | None = None
    for item in _fields(reader, node.start, node.end):
        if item.number == 1:
            inputs.append(_text(reader, item))
        elif item.number == 2:
            outputs.append(_text(reader, item))
        elif item.number in texts:
            texts[item.number] = _text(reader, item)
        elif item.number == 5:
            value = _attribute(reader, item, numbers, (parts, depth)) or value
    op = texts[4]
    if op == "Constant" and value is not None and outputs:
        parts.stored[outputs[0]] = Stored(outputs[0], value.shape, value.dtype, value.bytes)
    if op in ("Gemm", "QGemm") and numbers.get("transB"):
        op = f"{op} transB"
    matrix = (numbers["N"], numbers["K"]) if op == "MatMulNBits" and {"N", "K"} <= set(numbers) else None
    parts.nodes.append(Node(op, texts[3], tuple(inputs), tuple(outputs), matrix))


def _attribute(reader: Reader, attribute: _Field, numbers: dict[str, int], inside: tuple[_Parts, int]) -> Stored | None:
    name, tensor = "", None
    for item in _fields(reader, attribute.start, attribute.end):
        if item.number == 1:
            name = _text(reader, item)
        elif item.number == 3 and item.value < 1 << 40:
            numbers[name] = item.value
        elif item.number == 5:
            tensor = _tensor(reader, item)
        elif item.number in (6, 11):
            _graph(reader, item, inside[0], inside[1] + 1)
    return tensor


def _value_info(reader: Reader, value: _Field) -> tuple[str, tuple[int, ...]]:
    """Name and shape of an input or output; a size that is free is -1, and what is no tensor has no shape."""
    name, shape = "", []
    for item in _fields(reader, value.start, value.end):
        if item.number == 1:
            name = _text(reader, item)
        elif item.number == 2:
            for kind in _inside(reader, item, 1):
                for dims in _inside(reader, kind, 2):
                    shape = [_dimension(reader, dim) for dim in _inside(reader, dims, 1)]
    return name, tuple(shape)


def _inside(reader: Reader, message: _Field, number: int) -> Iterator[_Field]:
    return (item for item in _fields(reader, message.start, message.end) if item.number == number)


def _dimension(reader: Reader, dim: _Field) -> int:
    return next((item.value for item in _inside(reader, dim, 1) if item.value < 1 << 62), -1)


def _tensor(reader: Reader, tensor: _Field) -> Stored:
    name, kind, dims = "", 0, []
    payload: int | None = None
    typed = 0
    external: dict[str, str] = {}
    for item in _fields(reader, tensor.start, tensor.end):
        if item.number == 1:
            dims += _integers(reader, item)
        elif item.number == 2:
            kind = item.value
        elif item.number == 8:
            name = _text(reader, item)
        elif item.number == 9:
            payload = item.end - item.start
        elif item.number in _TYPED:
            typed += max(1, (item.end - item.start) // _TYPED[item.number])
        elif item.number == 13:
            key, value = (_entry(reader, item, number) for number in (1, 2))
            external[key] = value
    if kind not in _DTYPES:
        raise reader.broken(f"tensor `{name[:60]}` has unknown number format `{kind}`")
    if len(dims) > _MAX_RANK or any(dim >= 1 << 62 for dim in dims):
        raise reader.broken(f"tensor `{name[:60]}` has impossible sizes")
    dtype, bits = _DTYPES[kind]
    size_bytes = (prod(dims) * bits + 7) // 8
    if external:
        _check_external(reader, name, external, size_bytes)
    else:
        _check_payload(reader, Stored(name, tuple(dims), dtype, size_bytes), payload, typed)
    return Stored(name, tuple(dims), dtype, size_bytes)


def _integers(reader: Reader, item: _Field) -> list[int]:
    """A repeated integer: one by one, or packed into one field."""
    if item.start < 0:
        return [item.value]
    found: list[int] = []
    reader.seek(item.start)
    while reader.position < item.end and len(found) <= _MAX_RANK:
        found.append(_varint(reader, item.end))
    return found


def _entry(reader: Reader, entry: _Field, number: int) -> str:
    return next((_text(reader, item) for item in _inside(reader, entry, number)), "")


def _check_payload(reader: Reader, tensor: Stored, payload: int | None, typed: int) -> None:
    if tensor.dtype == "string":
        return
    if payload is not None and payload != tensor.bytes:
        shape = list(tensor.shape)
        raise reader.broken(f"tensor `{tensor.name[:60]}` of shape {shape} {tensor.dtype} needs {tensor.bytes} bytes but has `{payload}`")
    if payload is None and typed * 8 < prod(tensor.shape):  # an entry holds up to eight numbers of two bits
        raise reader.broken(f"tensor `{tensor.name[:60]}` of shape {list(tensor.shape)} has no data for that (truncated?)")


def _check_external(reader: Reader, name: str, external: Mapping[str, str], size_bytes: int) -> None:
    """The data lies in a file beside the model, and that file is long enough."""
    location = external.get("location", "")
    file = reader.path.parent / location
    try:
        offset, length = int(external.get("offset") or 0), int(external.get("length") or size_bytes)
        outside = not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts
    except ValueError:
        raise reader.broken(f"tensor `{name[:60]}` has external data at `{external}`") from None
    if outside:
        raise QhubError(f"`{reader.path}` names a file outside its folder", hint="do not use this model")
    if not file.is_file():
        raise QhubError(f"`{file}` does not exist, which holds weights of `{reader.path.name}`", hint="download the missing file")
    if length != size_bytes or offset < 0 or offset + length > file.stat().st_size:
        raise reader.broken(
            f"tensor `{name[:60]}` needs {size_bytes} bytes at `{offset}` of `{location}`, which are not there (truncated?)"
        )
