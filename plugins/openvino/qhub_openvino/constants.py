"""Constants of an IR as it is built: what lies in the model's files is not copied, what is rewritten lies in a file beside them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub_openvino.vendor import ops, ov

_SPILL = "rewritten.tmp"
_PAGE = 4096
_SMALL_BYTES = 1 << 16


class Constants:
    """Makes constants; a context, so that the file of rewritten bytes in the directory `out` goes again."""

    def __init__(self, out: Path) -> None:
        self.path = out / _SPILL
        self._file = self.path.open("wb")
        self._kept: list[NDArray[Any]] = []  # the constants do not copy them

    def __enter__(self) -> Constants:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()
        self._kept.clear()
        self.path.unlink()

    def mapped(self, values: NDArray[Any], kind: ov.Type, shape: tuple[int, ...], name: str) -> ov.Output:
        """A constant whose bytes are those of `values`, which lie in a mapped file."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._kept.append(flat)
        node = ops.constant(ov.Tensor(flat, ov.Shape(shape), kind), shared_memory=True)
        node.set_friendly_name(name)
        return node.output(0)

    def rewritten(self, values: NDArray[Any], kind: ov.Type, shape: tuple[int, ...], name: str) -> ov.Output:
        """The same for bytes in memory, which are written to the file, so that they need not stay there."""
        if values.nbytes <= _SMALL_BYTES:
            return self.mapped(values, kind, shape, name)
        start = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(values).data)
        self._file.flush()
        there: NDArray[np.uint8] = np.memmap(self.path, dtype=np.uint8, mode="r", offset=start, shape=(values.nbytes,))
        return self.mapped(there, kind, shape, name)
