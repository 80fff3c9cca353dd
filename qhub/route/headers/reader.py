"""Bounded reading of a binary header: nothing is read, and nothing allocated, before it is known to be in the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from os import fstat
from pathlib import Path
from typing import BinaryIO

from qhub.errors import DamagedModelError

#: No single name or list of a header is larger.
MAX_TAKE = 1 << 24


def broken(path: Path, kind: str, why: str) -> DamagedModelError:
    """The error for a file that is not what its format says."""
    return DamagedModelError(f"`{path}` is not a valid {kind} file: {why}", hint="download it again, or check how it was written")


class Reader:
    """Little-endian values of a file, from where it stands or at a given byte."""

    def __init__(self, file: BinaryIO, path: Path, kind: str) -> None:
        self._file, self.path, self.kind = file, path, kind
        self.file_bytes = fstat(file.fileno()).st_size
        self.position = 0

    def broken(self, why: str) -> DamagedModelError:
        """The error for this file."""
        return broken(self.path, self.kind, why)

    def seek(self, position: int) -> None:
        """Go to byte `position`.

        :raises DamagedModelError: when the file ends before it.
        """
        if not 0 <= position <= self.file_bytes:
            raise self.broken(f"it refers to byte `{position}` of `{self.file_bytes}`")
        self.position = position

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        :raises DamagedModelError: when the file ends before, or no header would hold so many at once.
        """
        if count > self.file_bytes - self.position:
            raise self.broken(f"`{count}` bytes are expected at byte `{self.position}` of `{self.file_bytes}` (truncated?)")
        if count > MAX_TAKE:
            raise self.broken(f"a single entry of its header claims `{count}` bytes")
        self._file.seek(self.position)
        data = self._file.read(count)
        self.position += count
        return data

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, which have to be there."""
        self.seek(self.position + count)

    def u8(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Two bytes, unsigned."""
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        """Four bytes, unsigned."""
        return int.from_bytes(self.take(4), "little")

    def i32(self) -> int:
        """Four bytes, signed."""
        return int.from_bytes(self.take(4), "little", signed=True)

    def u64(self) -> int:
        """Eight bytes, unsigned."""
        return int.from_bytes(self.take(8), "little")

    def unpack(self, form: str) -> tuple[int | float, ...]:
        """Values in the form that `struct` describes."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self, count: int) -> str:
        """`count` bytes as text; bytes that are none are replaced: names are only shown and compared."""
        return self.take(count).decode("utf-8", errors="replace")


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Reader]:
    """A reader of the file at `path`."""
    with path.open("rb") as file:
        yield Reader(file, path, kind)
