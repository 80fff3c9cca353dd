"""The pack cache: a model's matrices as the kernels read them, in one file that the next start reads.

The file: 8 bytes of magic, 8 bytes of header length (little-endian), 32 bytes sha256 of the header, the header (JSON: key and
entries), then the matrices at offsets that are multiples of 4096. One layout serves every instruction set (csrc/gemm.h), so
the key is the model's files and the layout's version. The model's own files never change.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub import cache_path
from qhub_native._native import Pool, Shape, checksum, read_file

LAYOUT_VERSION = 1
_MAGIC = b"QHUBPACK"
_PAGE = 4096
_PREFIX = len(_MAGIC) + 8 + 32


@dataclass(frozen=True)
class Entry:
    """A packed matrix in the file: where, its shape, the exponent of its scales, the checksum of its bytes."""

    offset: int
    rows: int
    inputs: int
    group: int
    bits: int
    symmetric: bool
    exponent: int = 0
    checksum: int = 0

    @property
    def shape(self) -> Shape:
        """As the kernels take it; checks that there is such a shape."""
        return Shape(self.rows, self.inputs, group=self.group, bits=self.bits, symmetric=self.symmetric)


def key_of(files: list[Path], settings: Mapping[str, Any]) -> str:
    """What a pack is made from: names, sizes and times of the model's files, the settings, the version of the layout."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([LAYOUT_VERSION, stats, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Where packs are kept: `QHUB_NATIVE_CACHE`, else below the user's cache directory."""
    chosen = os.environ.get("QHUB_NATIVE_CACHE")
    return Path(chosen) if chosen else cache_path("native")


def plan(shapes: Mapping[str, Shape]) -> dict[str, Entry]:
    """Entries of matrices laid one after the other from offset 0; `PackWriter` moves them behind the header."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        entries[name] = Entry(offset, shape.rows, shape.inputs, shape.group, shape.bits, shape.symmetric)
        offset += _rounded(shape.packed_bytes)
    return entries


def _rounded(count: int) -> int:
    return -(-count // _PAGE) * _PAGE


class Pack:
    """An opened pack: `matrix(name)` is a view of its bytes, valid as long as this object."""

    def __init__(self, entries: Mapping[str, Entry], memory: NDArray[np.uint8], *, from_cache: bool) -> None:
        self.entries = entries
        self.from_cache = from_cache
        self._memory = memory

    def matrix(self, name: str) -> NDArray[np.uint8]:
        """The bytes of matrix `name`."""
        entry = self.entries[name]
        return self._memory[entry.offset : entry.offset + entry.shape.packed_bytes]


def open_pack(path: Path, key: str, pool: Pool) -> Pack | None:
    """The pack at `path` if it is there, was made from `key` and is undamaged; None otherwise."""
    try:
        with path.open("rb") as file:
            found = _read_header(file.read(_PREFIX), file.read, key)
            if found is None:
                return None
            header_bytes, entries = found
            start = _rounded(_PREFIX + header_bytes)
            count = os.fstat(file.fileno()).st_size - start
        pack = Pack(entries, read_file(pool, str(path), start, count), from_cache=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return pack if _is_whole(pack, count, pool) else None


def _read_header(prefix: bytes, read: Any, key: str) -> tuple[int, dict[str, Entry]] | None:  # noqa: ANN401 - file.read
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < _PREFIX or not prefix.startswith(_MAGIC) or length > 1 << 28:
        return None
    text = read(length)
    if hashlib.sha256(text).digest() != prefix[16:]:
        return None
    header = json.loads(text)
    if header["key"] != key:
        return None
    return length, {name: Entry(**entry) for name, entry in header["entries"].items()}


def _is_whole(pack: Pack, count: int, pool: Pool) -> bool:
    for name, entry in pack.entries.items():
        if entry.offset + entry.shape.packed_bytes > count or checksum(pool, pack.matrix(name)) != entry.checksum:
            return False
    return True


def write_pack(path: Path, key: str, pack: Pack) -> None:
    """Write `pack` beside `path` and rename it into place.

    :raises OSError: when the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"key": key, "entries": {name: vars(entry) for name, entry in pack.entries.items()}}).encode()
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
            for name, entry in pack.entries.items():
                file.seek(_rounded(_PREFIX + len(header)) + entry.offset)
                file.write(pack.matrix(name).data)
            file.truncate(max(file.tell(), _rounded(file.tell())))
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
