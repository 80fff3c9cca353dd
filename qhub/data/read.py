"""`read_data`: labelled examples from whatever a path names."""

from __future__ import annotations

import os
from pathlib import Path

from qhub.data import digest
from qhub.data.arrays import read_npz
from qhub.data.dataset import Dataset
from qhub.data.folders import read_folder
from qhub.data.tables import read_table
from qhub.errors import QhubError, UsageError

_TABLES = (".csv", ".tsv", ".jsonl")
_KNOWN = "a folder of images or .wav files (one folder per class), .npz, .csv, .tsv or .jsonl"


def read_data(path: str | Path, *, samples: int | None = None, seed: int | None = None) -> Dataset:
    """The examples that `path` names, or `samples` of them (`Dataset.choose`).

    A folder of pictures or `.wav` files, with a folder per class or without labels; `.npz` with `x` and perhaps `y`, or a part of one,
    `file.npz#test` for `test_x` and `test_y`; `.csv`, `.tsv` or `.jsonl` with a column of text, or of words with tags.

    :raises UsageError: when the path does not exist or is none of these.
    :raises QhubError: when what is there cannot be used; it names the file and the row or line.
    """
    file, part = split_part(path)
    try:
        found = _read(file, part)
    except OSError as error:
        raise QhubError(f"`{error.filename or file}` cannot be read: {error.strerror}", hint="check its permissions") from None
    if part:
        found = found.named(f"{file}#{part}")
    return found if samples is None else found.choose(samples, seed)


def split_part(path: str | Path) -> tuple[Path, str]:
    """(file, part) of a data path: `file.npz#test` is the part `test`; a file whose name holds a `#` is the file.

    :raises UsageError: when there is no such file or folder.
    """
    text = os.fspath(path)
    whole = Path(text)
    if whole.exists():
        return whole, ""
    name, _, part = text.rpartition("#")
    if name and Path(name).exists():
        return Path(name), part
    raise UsageError(f"data `{name or text}` does not exist", hint=f"give {_KNOWN}")


def data_sha256(path: str | Path) -> str:
    """`Dataset.sha256` of what `path` names, by reading it."""
    file, part = split_part(path)
    return read_folder(file).sha256 if file.is_dir() else digest.of_part(file, part)


def _read(file: Path, part: str) -> Dataset:
    suffix = file.suffix.lower()
    if suffix == ".npz" and file.is_file():
        return read_npz(file, part)
    if part:
        raise UsageError(f"`{file}` has no parts; `#{part}` is for .npz files", hint=f"give `{file}`")
    if file.is_dir():
        return read_folder(file)
    if suffix in _TABLES:
        return read_table(file)
    raise UsageError(f"`{file}` is no data that is read here (`{suffix or 'no suffix'}`)", hint=f"give {_KNOWN}")
