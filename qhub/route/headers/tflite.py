"""TFLite: the flatbuffer of LiteRT's `schema.fbs`, read table by table; buffers are measured, not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qhub.route.headers.graph import Graph, Node, Stored, profile_graph
from qhub.route.headers.reader import Reader, opened
from qhub.types import ModelProfile

#: TensorType → (our name, bits of one number).
_DTYPES: Mapping[int, tuple[str, int]] = {
    0: ("fp32", 32), 1: ("fp16", 16), 2: ("int32", 32), 3: ("uint8", 8), 4: ("int64", 64), 5: ("string", 0), 6: ("bool", 8),
    7: ("int16", 16), 8: ("complex64", 64), 9: ("int8", 8), 10: ("fp64", 64), 11: ("complex128", 128), 12: ("uint64", 64),
    15: ("uint32", 32), 16: ("uint16", 16), 17: ("int4", 4), 18: ("bf16", 16),
}  # fmt: skip
_OPERATORS = {
    3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE", 7: "EMBEDDING_LOOKUP", 9: "FULLY_CONNECTED", 36: "GATHER",
    67: "TRANSPOSE_CONV", 114: "QUANTIZE", 126: "BATCH_MATMUL", 132: "CONV_3D",
}  # fmt: skip
_QUANTIZED = ("int8", "uint8", "int4", "int16")
_IDENTIFIER = b"TFL3"
_MAX_RANK, _MAX_ENTRIES = 16, 1 << 22


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    quantized: bool
    bytes: int | None  # None: not stored, a value of the computation


class _Table:
    """A table of the flatbuffer; fields are found through its vtable, each checked to lie in the file."""

    def __init__(self, reader: Reader, position: int) -> None:
        self._reader, self._position = reader, position
        reader.seek(position)
        self._vtable = position - reader.i32()
        reader.seek(self._vtable)
        size = reader.u16()
        self._fields = max(0, size - 4) // 2
        reader.skip(max(0, size - 2))

    def _place(self, field: int) -> int | None:
        if field >= self._fields:
            return None
        self._reader.seek(self._vtable + 4 + 2 * field)
        offset = self._reader.u16()
        return self._position + offset if offset else None

    def number(self, field: int, form: str, default: int = 0) -> int:
        """A scalar in the form that `struct` describes."""
        place = self._place(field)
        if place is None:
            return default
        self._reader.seek(place)
        return int(self._reader.unpack(form)[0])

    def table(self, field: int) -> _Table | None:
        """A table that the field refers to."""
        place = self._target(field)
        return None if place is None else _Table(self._reader, place)

    def vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        """(first byte, length) of a list, all of which lies in the file."""
        place = self._target(field)
        if place is None:
            return 0, 0
        self._reader.seek(place)
        count = self._reader.u32()
        start = self._reader.position
        self._reader.skip(count * item_bytes)
        return start, count

    def tables(self, field: int) -> list[_Table]:
        """A list of tables."""
        start, count = self.vector(field, 4)
        if count > _MAX_ENTRIES:
            raise self._reader.broken(f"a list claims `{count}` entries")
        found = []
        for index in range(count):
            self._reader.seek(start + 4 * index)
            found.append(_Table(self._reader, start + 4 * index + self._reader.u32()))
        return found

    def integers(self, field: int) -> tuple[int, ...]:
        """A list of 32-bit integers."""
        start, count = self.vector(field, 4)
        self._reader.seek(start)
        return tuple(int(number) for number in self._reader.unpack(f"<{count}i")) if count else ()

    def text(self, field: int) -> str:
        """A string."""
        start, count = self.vector(field, 1)
        self._reader.seek(start)
        return self._reader.text(count)

    def _target(self, field: int) -> int | None:
        place = self._place(field)
        if place is None:
            return None
        self._reader.seek(place)
        return place + self._reader.u32()


def profile_tflite(path: Path) -> ModelProfile:
    """Profile a TFLite model by its first subgraph.

    :raises DamagedModelError: when it is truncated or lies about sizes.
    """
    with opened(path, "TFLite") as reader:
        root = reader.u32()
        if reader.take(4) != _IDENTIFIER:
            raise reader.broken("bytes 4 to 8 are not `TFL3`")
        model = _Table(reader, root)
        subgraphs = model.tables(2)
        if not subgraphs:
            raise reader.broken("it has no subgraph")
        sizes = [_buffer_bytes(reader, buffer) for buffer in model.tables(4)]
        operators = [_operator(code) for code in model.tables(1)]
        tensors = [_tensor(reader, table, sizes) for table in subgraphs[0].tables(0)]
        graph = _graph(reader, subgraphs[0], tensors, operators)
    return profile_graph(path, graph, "tflite", _quantization(graph, tensors))


def _buffer_bytes(reader: Reader, buffer: _Table) -> int:
    """Bytes of a buffer, inside the flatbuffer or, in large models, behind it."""
    offset, size = buffer.number(1, "<Q"), buffer.number(2, "<Q")
    if offset > 1:  # 0 and 1 mean that the data is inside
        reader.seek(offset)
        reader.skip(size)
        return size
    return buffer.vector(0, 1)[1]


def _operator(code: _Table) -> str:
    """The operator by the old field of one byte or, above 127, the new one."""
    number = max(code.number(0, "<b"), code.number(3, "<i"))
    return _OPERATORS.get(number, str(number))


def _tensor(reader: Reader, table: _Table, sizes: list[int]) -> _Tensor:
    name, shape = table.text(3), table.integers(0)
    kind, buffer = table.number(1, "<b"), table.number(2, "<I")
    if len(shape) > _MAX_RANK or min(shape, default=0) < -1:
        raise reader.broken(f"tensor `{name[:60]}` has impossible sizes")
    if buffer >= max(len(sizes), 1):
        raise reader.broken(f"tensor `{name[:60]}` refers to buffer `{buffer}` of `{len(sizes)}`")
    dtype, bits = _DTYPES.get(kind, ("unknown", 0))
    quantization = table.table(4)
    quantized = quantization is not None and quantization.vector(2, 4)[1] > 0
    stored = sizes[buffer] if sizes else 0
    if stored and bits and min(shape, default=1) >= 0 and stored != (prod(shape) * bits + 7) // 8:
        needed = (prod(shape) * bits + 7) // 8
        raise reader.broken(f"tensor `{name[:60]}` of shape {list(shape)} {dtype} needs {needed} bytes but has `{stored}`")
    return _Tensor(name, shape, dtype, quantized, stored or None)


def _graph(reader: Reader, subgraph: _Table, tensors: list[_Tensor], operators: list[str]) -> Graph:
    stored, nodes = {}, []
    for index, tensor in enumerate(tensors):
        if tensor.bytes is not None:
            stored[str(index)] = Stored(tensor.name, tensor.shape, tensor.dtype, tensor.bytes)
    for table in subgraph.tables(3):
        code = table.number(0, "<I")
        if code >= len(operators):
            raise reader.broken(f"an operator has code `{code}` of `{len(operators)}`")
        inputs, outputs = (tuple(str(index) for index in table.integers(field)) for field in (1, 2))
        nodes.append(Node(operators[code], "", inputs, outputs))
    ends = ({str(index): _shape(reader, tensors, index) for index in subgraph.integers(field)} for field in (1, 2))
    return Graph(stored, nodes, next(ends), next(ends))


def _shape(reader: Reader, tensors: list[_Tensor], index: int) -> tuple[int, ...]:
    if not 0 <= index < len(tensors):
        raise reader.broken(f"it refers to tensor `{index}` of `{len(tensors)}`")
    return tensors[index].shape


def _quantization(graph: Graph, tensors: list[_Tensor]) -> str | None:
    """Quantized throughout (`static`), or only the weights, which are computed with as they are or in float (`weights`)."""
    weights = sorted({tensor.dtype for tensor in tensors if tensor.bytes is not None and tensor.quantized and tensor.dtype in _QUANTIZED})
    if not weights:
        return None
    values = any(tensor.bytes is None and tensor.quantized and tensor.dtype in _QUANTIZED for tensor in tensors)
    return f"tflite {'int8' if 'int8' in weights else weights[0]} {'static' if values else 'weights'}"
