"""How codes lie in ONNX: little-endian fields of 2, 4 or 8 bits, the first one in the lowest bits; pure functions of arrays.

`MatMulNBits` has blocks of 16 to 256 inputs, a power of two. A whole row is some blocks with one scale: the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qhub_onnxruntime.schemes import WIDTHS, width_of

_ROWS_BITS = 1 << 26  # codes are unpacked in pieces of so many bits


def fields(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """codes (…, C) uint8 → fields of `width` bits (…, ceil(C · width / 8)), the rest of the last byte 0."""
    if width == 8:
        return codes
    count = 8 // width
    spare = -codes.shape[-1] % count
    if spare:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], spare), dtype=np.uint8)], axis=-1)
    parts = codes.reshape(*codes.shape[:-1], -1, count)
    packed = parts[..., 0].copy()
    for index in range(1, count):
        packed |= parts[..., index] << np.uint8(width * index)
    return packed


def unfields(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `fields`: packed (…, B) → codes (…, count) uint8."""
    if width == 8:
        return packed[..., :count]
    mask = np.uint8((1 << width) - 1)
    parts = np.stack([(packed >> np.uint8(width * index)) & mask for index in range(8 // width)], axis=-1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :count]


def unstream(stream: NDArray[np.uint8], bits: int, inputs: int) -> NDArray[np.uint8]:
    """Rows of a bit stream (N, bytes), as a QuantizedModel has them → codes (N, K) uint8."""
    if bits in WIDTHS:
        return unfields(stream, bits, inputs)
    out = np.empty((len(stream), inputs), dtype=np.uint8)
    rows = max(1, _ROWS_BITS // (8 * inputs * bits))
    for start in range(0, len(stream), rows):
        piece = np.unpackbits(stream[start : start + rows], axis=1, bitorder="little", count=inputs * bits).reshape(-1, inputs, bits)
        out[start : start + rows] = np.packbits(piece, axis=2, bitorder="little")[:, :, 0]
    return out


def in_blocks(stream: NDArray[np.uint8], bits: int, inputs: int, block: int) -> NDArray[np.uint8]:
    """Rows of a bit stream (N, bytes) → fields (N, blocks, block · width / 8) of `MatMulNBits`; inputs beyond K are code 0."""
    width, blocks = width_of(bits), -(-inputs // block)
    if bits == width and inputs % block == 0:
        return stream[:, : inputs * bits // 8].reshape(len(stream), blocks, -1)
    codes = unstream(stream, bits, inputs)
    padded = np.pad(codes, ((0, 0), (0, blocks * block - inputs)))
    return fields(padded.reshape(len(codes), blocks, block), width)


def per_block(values: NDArray[np.generic], blocks: int) -> NDArray[np.generic]:
    """values (N, G) of groups → (N, blocks): a group's blocks have its value."""
    return np.repeat(values, blocks // values.shape[1], axis=1)


def per_group(values: NDArray[np.generic], groups: int) -> NDArray[np.generic] | None:
    """The inverse of `per_block`; None if blocks of one group differ."""
    parts = values.reshape(len(values), groups, -1)
    return np.ascontiguousarray(parts[:, :, 0]) if (parts == parts[:, :, :1]).all() else None
