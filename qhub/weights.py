"""Reads safetensors files: headers checked against the file before anything is allocated, tensors one at a time.

Format: https://github.com/huggingface/safetensors#format. A tensor is read with `pread` into memory that the caller owns;
files are never mapped, so the memory of a process is what it asked for, not what it touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qhub.errors import QhubError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".th")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `bytes` within `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name.

    :raises QhubError: when the file is truncated, its header is not what the format says, or sizes do not add up.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = header_size(path, file.read(8), file_bytes)
            text = file.read(header_bytes)
    except FileNotFoundError:
        raise QhubError(f"`{path}` does not exist", hint="download the missing shard again") from None
    return parse_header(path, text, file_bytes)


def header_size(path: Path, start: bytes, file_bytes: int) -> int:
    """Bytes of the header that begins at byte 8, by the file's first 8 bytes.

    :raises QhubError: when the file is not that long.
    """
    header_bytes = int.from_bytes(start, "little")
    _check_header_size(path, file_bytes, header_bytes)
    return header_bytes


def parse_header(path: Path, text: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `file_bytes` whose header is `text`; `path` is where it lies, for the reader of an error.

    :raises QhubError: when the header is not what the format says, or sizes do not add up.
    """
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    start = 8 + len(text)
    tensors = {name: _tensor_info(path, name, entry, start, file_bytes) for name, entry in header.items() if name != "__metadata__"}
    _check_overlap(path, tensors)
    return tensors


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; two readers of a name that is given twice would disagree."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise _broken(path, f"tensor `{twice}` is listed twice")
    return entries


def _check_header_size(path: Path, file_bytes: int, header_bytes: int) -> None:
    if file_bytes < 10:
        raise _broken(path, f"it has `{file_bytes}` bytes")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise _broken(path, f"its header claims `{header_bytes}` bytes in a file of `{file_bytes}`")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> TensorInfo:  # noqa: ANN401 - JSON
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(isinstance(number, int) for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise _broken(path, f"the entry of tensor `{name}` is malformed")
    if dtype not in ITEM_BYTES:
        raise _broken(path, f"tensor `{name}` has unknown dtype `{dtype}`")
    expected = prod(shape) * ITEM_BYTES[dtype]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != expected:
        raise _broken(path, f"tensor `{name}` of shape {list(shape)} {dtype} needs {expected} bytes but claims `{end - begin}`")
    if data_start + end > file_bytes:
        raise _broken(path, f"tensor `{name}` ends at byte `{data_start + end}` of a file of `{file_bytes}` (truncated?)")
    return TensorInfo(name, dtype, shape, path, data_start + begin, expected)


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    end, last = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.bytes)):
        if info.offset < end:
            raise _broken(path, f"tensors `{last}` and `{info.name}` overlap")
        end, last = info.offset + info.bytes, info.name


def _broken(path: Path, why: str) -> QhubError:
    return QhubError(f"`{path}` is not a valid safetensors file: {why}", hint="download it again, or check how it was written")


class WeightFiles(Mapping[str, TensorInfo]):
    """The tensors of a model folder, sharded or not, by name; reads only headers until `read` is called."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Open a model folder.

        :raises QhubError: when there are no safetensors files (a pickle is refused with the way to convert it), an index
            names a missing file or tensor, or a file is broken.
        """
        index = folder / INDEX
        if index.exists():
            return cls(folder, _read_sharded(folder, index))
        single = folder / SINGLE
        if single.exists():
            return cls(folder, read_header(single))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise no_weights(folder)
        return cls.open_shards(folder, [file.name for file in files])

    @classmethod
    def open_shards(cls, folder: Path, shards: Sequence[str]) -> WeightFiles:
        """Open the named files of `folder` as one model, without an index."""
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            tensors.update(read_header(folder / shard))
        return cls(folder, tensors)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def files(self) -> list[Path]:
        """The files in use, sorted by name."""
        return sorted({info.file for info in self._tensors.values()})

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill `buffer` (exactly the tensor's bytes, writable, owned by the caller) with the raw data of `name`.

        :raises QhubError: when the file ends early.
        """
        info = self._tensors[name]
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            done = 0
            while done < info.bytes:
                count = file.readinto(buffer[done:])
                if not count:
                    raise _broken(info.file, f"tensor `{name}` ends after `{done}` of {info.bytes} bytes")
                done += count


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise QhubError(f"`{index}` is not a valid index of shards", hint="download it again") from None
    if outside:
        raise QhubError(f"`{index}` names a file outside its folder", hint="do not use this model")
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise QhubError(f"`{index}` says that `{shard}` holds `{name}`, which it does not", hint="download the model again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def no_weights(folder: Path) -> QhubError:
    """The error for a folder without safetensors: names the pickle if there is one, and how to convert it."""
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    if not pickles:
        return QhubError(f"`{folder}` has no safetensors files", hint="a model folder holds config.json and *.safetensors")
    convert = (
        'python -c "from transformers import AutoModelForCausalLM as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )
    return _pickle(pickles[0], convert)


def pickle_refused(path: Path) -> QhubError:
    """The error for a pickle that is given itself, with how to convert what it holds."""
    convert = (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
    )
    return _pickle(path, convert)


def _pickle(path: Path, convert: str) -> QhubError:
    message = f"`{path}` is a pickle, which can run code when it is opened; qhub reads safetensors only"
    return QhubError(message, hint=f"if you trust it, convert it: {convert}")
