"""The tensors of a model folder, mapped, not read: float rows stay where they are, what is packed is let go again."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qhub.errors import QhubError
from qhub.weights import TensorInfo, WeightFiles

_ALIGNED = 8
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


class MappedTensors:
    """A model folder's safetensors files, mapped read-only."""

    def __init__(self, folder: Path) -> None:
        self.files = WeightFiles.open(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched: set[Path] = set()

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of `name`.

        :raises QhubError: when there is no such tensor.
        """
        try:
            return self.files[name]
        except KeyError:
            raise QhubError(f"`{self.files.folder}` has no tensor `{name}`", hint=f"qhub inspect {self.files.folder}") from None

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of `name`, valid as long as this object; a copy where the file does not keep numbers aligned."""
        info = self.info(name)
        found = np.frombuffer(self._map(info.file), dtype=np.uint8, count=info.bytes, offset=info.offset)
        return found.copy() if info.offset % _ALIGNED else found

    def array(self, name: str) -> NDArray[np.generic]:
        """Tensor `name` in its shape; BF16 as float32 (a copy), other dtypes as they are stored."""
        info = self.info(name)
        raw, stored = self.raw(name), _NUMPY.get(info.dtype, "<u2")
        found: NDArray[np.generic] = raw.view(stored).reshape(info.shape)
        if info.dtype == "BF16":
            found = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return found

    def floats(self, name: str) -> NDArray[np.float32]:
        """Tensor `name` as float32, a copy."""
        return np.array(self.array(name), dtype=np.float32, order="C")

    def release(self) -> None:
        """Let the pages go that were read so far; they come back from the file when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in self._touched:
                self._maps[file].madvise(mmap.MADV_DONTNEED)
        self._touched.clear()

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        self._touched.add(file)
        return self._maps[file]
