"""A linear layer of a QuantizedModel as arrays: the codes' bytes as they lie in the file, scales and zeros unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qhub.decoders.tensors import MappedTensors
from qhub.types import Scheme


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer: codes (N, bytes per row), scale (N, G) float32, zero (N, G) uint8 or None if symmetric."""

    scheme: Scheme
    inputs: int
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8] | None

    @property
    def every(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.group_size or self.inputs

    @property
    def outputs(self) -> int:
        """N."""
        return len(self.codes)


def packed_layer(tensors: MappedTensors, name: str, scheme: Scheme) -> PackedLayer:
    """Layer `name` of the files, stored as `qhub.quantize.store` says."""
    rows, inputs = (int(number) for number in tensors.array(f"{name}.weight_shape"))
    codes = tensors.raw(f"{name}.weight_packed").reshape(rows, -1)
    scale = tensors.floats(f"{name}.weight_scale")
    zero = None if scheme.symmetric else _zeros(tensors, f"{name}.weight_zero_point", scheme.weight_bits, scale.shape)
    return PackedLayer(scheme, inputs, codes, scale, zero)


def _zeros(tensors: MappedTensors, name: str, bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """zero (N, G): stored as int8 less 2**(bits − 1), or as a bit stream along N (words (ceil(N · bits / 32), G))."""
    stored = tensors.array(name)
    if stored.dtype == np.int8:
        return (stored.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if 32 % bits == 0:
        return _whole_words(stored.view("<u4"), bits, shape)
    stream = np.ascontiguousarray(stored.T).view(np.uint8)
    flat = np.unpackbits(stream, axis=1, bitorder="little", count=shape[0] * bits).reshape(shape[1], shape[0], bits)
    return np.ascontiguousarray(np.packbits(flat, axis=2, bitorder="little")[:, :, 0].T)


def _whole_words(words: NDArray[np.uint32], bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """words (ceil(N · bits / 32), G), each of 32 / bits zeros of successive outputs → zero (N, G)."""
    count = 32 // bits
    out = np.empty((len(words), count, shape[1]), dtype=np.uint8)
    for index in range(count):
        out[:, index] = (words >> np.uint32(bits * index)) & np.uint32((1 << bits) - 1)
    return out.reshape(-1, shape[1])[: shape[0]]
