"""GGUF: metadata and tensor infos of llama.cpp's format, versions 2 and 3 (ggml/docs/gguf.md). Data is never read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qhub.errors import QhubError
from qhub.route.headers.reader import Reader, opened

Value = int | float | str | tuple[int, ...]
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_ITEM_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_MAX_KEPT, _MAX_DEPTH, _MAX_DIMS, _MAX_SPLITS = 4096, 3, 4, 1000
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")
#: ggml's number formats by id: (name, numbers of a block, bytes of a block).
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("fp32", 1, 4), 1: ("fp16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("fp64", 1, 8),
    29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file; `shape` is (…, N, K), the reverse of the file's order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """What a GGUF model says of itself; of a list in the metadata its length (under `key#`), and its numbers if they are few."""

    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF model; one that was split is read as a whole, whichever of its files is given.

    :raises DamagedModelError: when a file is truncated or lies about sizes. :raises QhubError: when a file of a split is missing.
    """
    first = _read(path)
    count = first.metadata.get("split.count")
    if not isinstance(count, int) or count <= 1:
        return first
    files = [_read(file) for file in _splits(path, count)]
    return Gguf({**files[0].metadata}, tuple(tensor for file in files for tensor in file.tensors))


def _splits(path: Path, count: int) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None or count > _MAX_SPLITS:
        raise QhubError(f"`{path}` is one of `{count}` files, but its name is not like `model-00001-of-00003.gguf`", hint="rename it")
    files = [path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise QhubError(f"`{missing}` does not exist", hint="download the missing file")
    return files


def _read(path: Path) -> Gguf:
    with opened(path, "GGUF") as reader:
        if reader.take(4) != b"GGUF":
            raise reader.broken("it does not begin with `GGUF`")
        version = reader.u32()
        if version not in (2, 3):
            raise reader.broken(f"version `{version}` is neither 2 nor 3" + (", or big-endian" if version & 0xFFFF == 0 else ""))
        tensors, values = reader.u64(), reader.u64()
        rest = reader.file_bytes - reader.position
        if tensors * 24 + values * 13 > rest:  # the least that so many entries need
            raise reader.broken(f"it claims `{tensors}` tensors and `{values}` values in `{rest}` bytes (truncated?)")
        metadata: dict[str, Value] = {}
        for _ in range(values):
            key = _string(reader)
            _value(reader, key, metadata)
        return Gguf(metadata, _tensors(reader, tensors, metadata))


def _string(reader: Reader) -> str:
    return reader.text(reader.u64())


def _value(reader: Reader, key: str, metadata: dict[str, Value]) -> None:
    kind = reader.u32()
    if kind == _STRING:
        metadata[key] = _string(reader)
    elif kind == _ARRAY:
        _array(reader, key, metadata, 0)
    elif kind in _SCALARS:
        metadata[key] = reader.unpack(_SCALARS[kind])[0]
    else:
        raise reader.broken(f"the value of `{key[:60]}` has unknown type `{kind}`")


def _array(reader: Reader, key: str, metadata: dict[str, Value], depth: int) -> None:
    kind, count = reader.u32(), reader.u64()
    metadata[f"{key}#"] = count
    if kind in _ITEM_BYTES:
        if kind in _INTEGERS and count <= _MAX_KEPT:
            metadata[key] = tuple(int(number) for number in reader.unpack(f"<{count}{_SCALARS[kind][1]}"))
        else:
            reader.skip(count * _ITEM_BYTES[kind])
        return
    if kind not in (_STRING, _ARRAY) or depth == _MAX_DEPTH:
        raise reader.broken(f"the list `{key[:60]}` has unknown type `{kind}`")
    if count * 8 > reader.file_bytes - reader.position:
        raise reader.broken(f"the list `{key[:60]}` claims `{count}` entries (truncated?)")
    for _ in range(count):
        if kind == _STRING:
            reader.skip(reader.u64())
        else:
            _array(reader, key, metadata, depth + 1)


def _tensors(reader: Reader, count: int, metadata: Mapping[str, Value]) -> tuple[GgufTensor, ...]:
    found: list[tuple[GgufTensor, int]] = [_tensor(reader) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise reader.broken(f"its alignment is `{alignment}`")
    start = -(-reader.position // alignment) * alignment
    for tensor, offset in found:
        if start + offset + tensor.bytes > reader.file_bytes:
            end = start + offset + tensor.bytes
            raise reader.broken(f"tensor `{tensor.name[:60]}` ends at byte `{end}` of a file of `{reader.file_bytes}` (truncated?)")
    return tuple(tensor for tensor, _ in found)


def _tensor(reader: Reader) -> tuple[GgufTensor, int]:
    name, rank = _string(reader), reader.u32()
    if rank > _MAX_DIMS:
        raise reader.broken(f"tensor `{name[:60]}` has `{rank}` dimensions")
    dims = [reader.u64() for _ in range(rank)]
    kind, offset = reader.u32(), reader.u64()
    if kind not in TYPES:
        raise reader.broken(f"tensor `{name[:60]}` has unknown number format `{kind}`")
    dtype, numbers, size_bytes = TYPES[kind]
    if dims and dims[0] % numbers:
        raise reader.broken(f"tensor `{name[:60]}` has rows of `{dims[0]}`, which blocks of {numbers} do not divide")
    return GgufTensor(name, tuple(reversed(dims)), dtype, prod(dims) * size_bytes // numbers), offset
