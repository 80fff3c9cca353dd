"""Which layers become one matrix, and packing them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qhub import DecoderFiles, PackedLayer, QhubError
from qhub_native import packs
from qhub_native._native import Pool, Shape, pack, pack_float
from qhub_native.layers import GROUPS, packed_shape, part_of

STACKS = ("qkv", "out", "gate_up", "down")
#: Layers that become one matrix, one below the other; the first one's name is the matrix's.
Run = tuple[str, ...]


class Matrices:
    """The linear layers of a model by their place in the decoder, and which of them become one matrix."""

    def __init__(self, files: DecoderFiles) -> None:
        self.files, self.tensors, self.schemes, self.head = files, files.tensors, files.schemes, files.head
        blocks = range(files.config.layers)
        self.runs = {(block, stack): self._grouped(names) for block in blocks for stack, names in files.linears(block).items()}

    def packed(self) -> Iterator[Run]:
        """The layers of each matrix of quantized weights."""
        for runs in (*self.runs.values(), [(self.head,)]):
            yield from (names for names in runs if names[0] in self.schemes)

    def _grouped(self, names: Run) -> list[Run]:
        """Those of one scheme that follow one another together."""
        runs: list[Run] = []
        for name in names:
            alike = runs and name in self.schemes and self.schemes.get(runs[-1][0]) == self.schemes[name]
            runs[-1:] = [(*runs[-1], name)] if alike else [*runs[-1:], (name,)]
        return runs


def pack_all(matrices: Matrices, pool: Pool, *, exact: bool) -> packs.Pack:
    """Every matrix of quantized weights, packed; unless `exact` a float head too, rounded to 8 bits.

    :raises QhubError: when a layer is not what its scheme says.
    """
    shapes = {names[0]: packed_shape(matrices.files, names) for names in matrices.packed()}
    rounded = not exact and matrices.head not in shapes
    if rounded:
        shapes[matrices.head] = _head_shape(matrices)
    entries = packs.plan(shapes)
    memory = aligned(max((entry.offset + entry.shape.packed_bytes for entry in entries.values()), default=0))
    made = packs.Pack(entries, memory, from_cache=False)
    for names in matrices.packed():
        parts = [matrices.files.packed(name) for name in names]
        exponent = _pack_parts(matrices, pool, parts, (shapes[names[0]], made.matrix(names[0])))
        entries[names[0]] = replace(entries[names[0]], exponent=exponent)
        matrices.tensors.release()
    if rounded:
        name = f"{matrices.head}.weight"
        pack_float(pool, shapes[matrices.head], matrices.tensors.raw(name), matrices.tensors.info(name).dtype, made.matrix(matrices.head))
        matrices.tensors.release()
    for name, entry in entries.items():
        entries[name] = replace(entry, checksum=packs.checksum(pool, made.matrix(name)))
    return made


def _pack_parts(matrices: Matrices, pool: Pool, parts: list[PackedLayer], to: tuple[Shape, NDArray[np.uint8]]) -> int:
    """The exponent of the scales of the matrix that the parts become in the memory `to`."""
    try:
        return int(pack(pool, to[0], [part_of(part) for part in parts], to[1]))
    except ValueError as error:
        message = f"a layer of `{matrices.files.folder}` does not fit its scheme: {error}"
        raise QhubError(message, hint="quantize the model again") from None


def _head_shape(matrices: Matrices) -> Shape:
    rows, inputs = matrices.tensors.info(f"{matrices.head}.weight").shape
    group = next((size for size in GROUPS if inputs % size == 0), GROUPS[-1])
    return Shape(rows, inputs, group=group, bits=8, symmetric=True)


def aligned(count: int) -> NDArray[np.uint8]:
    """`count` bytes that begin at a multiple of 4096."""
    memory = np.empty(count + 4096, dtype=np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + count]
