"""Arrays in a `.npz` file: unpacked to disk and mapped from there, so that none is ever wholly in memory."""

from __future__ import annotations

import shutil
import tempfile
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qhub.data import digest
from qhub.data.dataset import Dataset, Kind, checked, numbered
from qhub.errors import QhubError

_COPY_BYTES = 1 << 22
_CHECK_BYTES = 32 << 20
#: What zipfile, zlib and numpy's reading of headers raise on files that are not what they say (RuntimeError: encrypted).
_DAMAGE = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, ValueError, EOFError, OSError, RuntimeError)
_PREFIXES = ("test", "train", "val", "valid", "eval", "calib")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of an array; `kind` image: uint8 pictures, channels last."""

    path: Path
    array: NDArray[Any]
    channels_first: bool

    def item(self, number: int) -> NDArray[Any]:
        """Row `number`, copied out of the file; pictures as (H, W, C)."""
        row = np.array(self.array[number])
        return np.ascontiguousarray(row.transpose(1, 2, 0)) if self.channels_first else row

    def where(self, number: int) -> str:
        """The row's place in words."""
        return f"row {number} of `{self.path}`"


def read_npz(path: Path, part: str = "") -> Dataset:
    """`x` and, where there is one, `y`; with a `part` such as `test` the pair `test_x`, `test_y`.

    uint8 arrays (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels are pictures; every other array stays as it is.

    :raises QhubError: when an array is missing, is no numbers, holds NaN or infinity, or x and y differ in length.
    """
    with _opened(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        x_name = _member(path, names, part)
        y_name = f"{x_name[:-1]}y"
        x = _mapped(archive, path, x_name)
        y = _mapped(archive, path, y_name) if y_name in names else None
        classes = _mapped(archive, path, "class_names") if "class_names" in names else None
    if x.ndim < 1:
        raise QhubError(f"`{x_name}` in `{path}` is a single number", hint="save one row per item, (N, ...)")
    check_finite(x, path, x_name)
    kind, channels_first = _kind(x)
    labels = None if y is None else _labels(y, path, y_name)
    reader, sha256 = Rows(path, x, channels_first), digest.of_part(path, part)
    names_of = None if classes is None else tuple(str(name) for name in classes.tolist())
    return checked(Dataset(str(path), kind, reader, numbered(len(x)), sha256, labels, names_of))


def check_finite(x: NDArray[Any], path: Path, name: str) -> None:
    """Read all of a floating-point array once, in pieces.

    :raises QhubError: at the first row with NaN or infinity.
    """
    if not np.issubdtype(x.dtype, np.floating):
        return
    rows = max(1, _CHECK_BYTES // max(1, x[:1].nbytes))
    for start in range(0, len(x), rows):
        piece = x[start : start + rows]
        bad = np.flatnonzero(~np.isfinite(piece).reshape(len(piece), -1).all(axis=1))
        if len(bad):
            what = "NaN" if np.isnan(piece[bad[0]]).any() else "infinity"
            hint = "leave such rows out, or find where they come from (a division by a zero deviation is frequent)"
            raise QhubError(f"row {start + int(bad[0])} of `{name}` in `{path}` holds {what}", hint=hint)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise QhubError(f"`{path}` is not an .npz file ({error})", hint="write it with `numpy.savez(FILE, x=..., y=...)`") from None


def _member(path: Path, names: list[str], part: str) -> str:
    """Which array is x: that of the part, else `x`, else the only one that ends in `_x`."""
    pairs = sorted(name[:-2] for name in names if name.endswith("_x"))
    if part:
        if f"{part}_x" in names:
            return f"{part}_x"
        hint = f"it has the parts {', '.join(pairs)}" if pairs else "leave the part out"
        raise QhubError(f"`{path}` has no array `{part}_x` (it holds {', '.join(names) or 'nothing'})", hint=hint)
    if "x" in names:
        return "x"
    if len(pairs) == 1:
        return f"{pairs[0]}_x"
    if pairs:
        raise QhubError(f"`{path}` has several parts: {', '.join(pairs)}", hint=f"say which: `{path}#{_likely(pairs)}`")
    hint = "write it with `numpy.savez(FILE, x=..., y=...)`"
    raise QhubError(f"`{path}` has no array `x` (it holds {', '.join(names) or 'nothing'})", hint=hint)


def _likely(pairs: list[str]) -> str:
    return next((name for name in _PREFIXES if name in pairs), pairs[0])


def _mapped(archive: zipfile.ZipFile, path: Path, name: str) -> NDArray[Any]:
    """An array of the archive."""
    try:
        with archive.open(f"{name}.npy") as member:
            shape, fortran, dtype = _header(member)
            if dtype.hasobject:
                raise QhubError(f"`{name}` in `{path}` holds Python objects, not numbers", hint="save it as one array of numbers")
            if not np.prod(shape, dtype=np.int64):
                return np.empty(shape, dtype)
            return _map_copy(member, shape, dtype, "F" if fortran else "C")
    except _DAMAGE as error:
        raise QhubError(f"`{name}` in `{path}` is damaged ({error})", hint="write the file again") from None


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    untyped: Any = npy  # whether its functions have types depends on numpy's version
    version = untyped.read_magic(member)
    read = untyped.read_array_header_1_0 if version == (1, 0) else untyped.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _map_copy(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], order: Literal["C", "F"]) -> NDArray[Any]:
    """What is left of `member` as an array: a map of a temporary file without a name, which goes with the map."""
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(member, copy, _COPY_BYTES)
        copy.flush()
        if copy.tell() != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise ValueError(f"{copy.tell()} bytes for the shape {shape}")
        return np.memmap(copy, dtype=dtype, mode="r", shape=shape, order=order)


def _kind(x: NDArray[Any]) -> tuple[Kind, bool]:
    """(kind, whether channels come first)."""
    channels = (1, 3, 4)
    if x.dtype != np.uint8 or x.ndim != 4 or not {x.shape[1], x.shape[3]} & set(channels):
        return "array", False
    return "image", x.shape[3] not in channels


def _labels(y: NDArray[Any], path: Path, name: str) -> NDArray[np.int64]:
    flat = y.reshape(len(y), -1) if y.ndim else y.reshape(0, 1)
    if flat.shape[1:] != (1,) or not np.issubdtype(y.dtype, np.integer):
        what = f"`{name}` in `{path}` is {y.dtype} {y.shape}; labels are one whole number per item"
        raise QhubError(what, hint="save class numbers: `y.argmax(1)` turns one-hot rows into them")
    return flat[:, 0].astype(np.int64)
