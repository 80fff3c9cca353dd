"""A list of equal-shaped tensors that goes to disk when memory is short: hidden states, one entry per calibration batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qhub.errors import QhubError


class Spool:
    """Tensors by index, kept in memory up to `limit_bytes` and in the file `path` beyond.

    What is on disk is read with `pread` into fresh memory, so it never counts against the process twice.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._memory: dict[int, torch.Tensor] = {}
        self._memory_bytes = 0
        self._on_disk: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._memory) + len(self._on_disk)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, tensor: torch.Tensor) -> None:
        """Add a tensor at the end; it must not be changed afterwards."""
        self[len(self)] = tensor

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        fits = self._memory_bytes + tensor.nbytes <= self.limit_bytes
        if index in self._memory or (fits and index not in self._on_disk):
            self._memory_bytes += 0 if index in self._memory else tensor.nbytes
            self._memory[index] = tensor
            return
        offset = self._on_disk[index][0] if index in self._on_disk else self._end
        self._write(tensor, offset)
        self._on_disk[index] = (offset, tensor.shape, tensor.dtype)
        self._end = max(self._end, offset + tensor.nbytes)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self._memory:
            return self._memory[index]
        offset, shape, dtype = self._on_disk[index]
        tensor = torch.empty(shape, dtype=dtype)
        view, done = _bytes_of(tensor), 0
        while done < len(view):
            done += os.preadv(self._descriptor(), [view[done:]], offset + done)
        return tensor

    def _write(self, tensor: torch.Tensor, offset: int) -> None:
        view, done = _bytes_of(tensor.contiguous().cpu()), 0
        while done < len(view):
            done += os.pwrite(self._descriptor(), view[done:], offset + done)

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.unlink(self.path)  # the space is given back however this process ends
        return self._file

    def save(self, path: Path) -> None:
        """Write all tensors, one after the other, beside `path` and rename into place."""
        partial = path.with_suffix(".partial")
        with partial.open("wb", buffering=0) as file:
            for tensor in self:
                view = _bytes_of(tensor.contiguous().cpu())
                while view:  # a raw file may take less than it is given
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        partial.rename(path)

    def load(self, path: Path, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        """Append what `save` wrote.

        :raises QhubError: when the file does not have the size that the shapes ask for.
        """
        expected = sum(shape.numel() for shape in shapes) * dtype.itemsize
        if path.stat().st_size != expected:
            message = f"`{path}` has `{path.stat().st_size}` bytes, not {expected}"
            raise QhubError(message, hint=f"`rm {path}`, then `--resume` again: it goes on from an earlier block")
        with path.open("rb", buffering=0) as file:
            for shape in shapes:
                tensor = torch.empty(shape, dtype=dtype)
                view = _bytes_of(tensor)
                while view:
                    view = view[file.readinto(view) :]
                self.append(tensor)

    def close(self) -> None:
        """Give memory and disk back."""
        self._memory.clear()
        self._on_disk.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
