"""Codes to bytes and back, in the layout of compressed-tensors: a dense bit stream along each row, first element lowest.

Source: compressed-tensors `compressors/pack_quantized`; a row takes ceil(K·bits/32) little-endian 32-bit words.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_ROWS_AT_ONCE = 4096


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (R, C) uint8, 0 … 2**bits − 1 → int32 (R, ceil(C·bits/32)); pads with zeros."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    out = np.zeros((rows, words * 4), dtype=np.uint8)
    values = codes.cpu().numpy()
    for start in range(0, rows, _ROWS_AT_ONCE):
        stream = _to_bytes(values[start : start + _ROWS_AT_ONCE], bits)
        out[start : start + _ROWS_AT_ONCE, : stream.shape[1]] = stream
    return torch.from_numpy(out.view("<i4"))


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 (R, ceil(columns·bits/32)) → codes (R, columns) uint8."""
    stream = np.ascontiguousarray(words.numpy()).view(np.uint8)
    out = np.empty((words.shape[0], columns), dtype=np.uint8)
    for start in range(0, words.shape[0], _ROWS_AT_ONCE):
        out[start : start + _ROWS_AT_ONCE] = _from_bytes(stream[start : start + _ROWS_AT_ONCE], bits, columns)
    return torch.from_numpy(out)


def _to_bytes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return codes
    if bits == 4 and codes.shape[1] % 2 == 0:
        pairs: NDArray[np.uint8] = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
        return pairs
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little", count=bits)
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def _from_bytes(stream: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    if bits == 8:
        return stream[:, :columns]
    if bits == 4 and columns % 2 == 0:
        pairs = stream[:, : columns // 2]
        return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(stream), columns)
    flat = np.unpackbits(stream, axis=1, bitorder="little", count=columns * bits).reshape(len(stream), columns, bits)
    return np.packbits(flat, axis=2, bitorder="little")[:, :, 0]
