"""How codes lie in OpenVINO's constants: one row of fields of 4 or 8 bits, the first one in the lowest bits; pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROWS_BITS = 1 << 26  # codes are unpacked in pieces of so many bits


def unstream(stream: NDArray[np.uint8], bits: int, inputs: int) -> NDArray[np.uint8]:
    """Rows of a bit stream (N, bytes), as a QuantizedModel has them → codes (N, K) uint8."""
    out = np.empty((len(stream), inputs), dtype=np.uint8)
    rows = max(1, _ROWS_BITS // (8 * inputs * bits))
    for start in range(0, len(stream), rows):
        piece = np.unpackbits(stream[start : start + rows], axis=1, bitorder="little", count=inputs * bits).reshape(-1, inputs, bits)
        out[start : start + rows] = np.packbits(piece, axis=2, bitorder="little")[:, :, 0]
    return out


def fields(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """codes uint8, of any shape → a row of fields of `width` bits, the first in the lowest bits, the rest of the last byte 0."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if width == 8:
        return flat
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return flat[::2] | (flat[1::2] << np.uint8(4))


def unfields(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `fields`: `count` codes in a row."""
    flat = packed.reshape(-1)
    return flat[:count] if width == 8 else np.stack([flat & np.uint8(15), flat >> np.uint8(4)], axis=1).reshape(-1)[:count]
