"""sha256 of what a data path means: a file, a folder's files by name and content, or a part of a file (`file.npz#test`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK_BYTES = 1 << 22


def of_file(path: Path) -> str:
    """sha256 of one file, as `sha256sum` prints it; streamed."""
    result = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            result.update(piece)
    return result.hexdigest()


def of_part(path: Path, part: str) -> str:
    """sha256 of a named part of a file: another part of the same file is other data. Without a part it is the file's own."""
    whole = of_file(path)
    return hashlib.sha256(f"{whole} {part}".encode()).hexdigest() if part else whole


def of_folder(folder: Path, files: Iterable[Path]) -> str:
    """sha256 over the names (relative to `folder`, POSIX) and contents of `files`, in the order of their names."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        total.update(f"{name} {of_file(path)}\n".encode())
    return total.hexdigest()
