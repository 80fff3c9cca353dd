"""The one definition of a quantized matrix: codes, scale, zero. Every layout that qhub writes derives from it.

    W[n, k] ≈ (codes[n, k] − zero[n, g]) · scale[n, g],   g = k // group_size

Scales are exact in fp16 and in the artifact's dtype and zeros are integers ≥ 1, so that each format carries the same
numbers bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qhub.errors import Unsupported
from qhub.types import Scheme

LARGEST_SCALE = {torch.bfloat16: 65280.0}  # the largest number that fp16 and bf16 both hold


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix of N outputs and K inputs in G groups along K.

    codes (N, K) uint8, 0 … 2**bits − 1 · scale (N, G) float32 > 0 · zero (N, G) float32, integers 1 … 2**bits − 1
    (2**(bits−1) everywhere if symmetric).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    symmetric: bool

    def equals(self, other: QTensor) -> bool:
        """Whether both hold the same numbers of the same bits."""
        alike = all(torch.equal(one, two) for one, two in ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero)))
        return alike and (self.bits, self.symmetric) == (other.bits, other.symmetric)

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a scale; K itself when there is one scale per output."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def bytes(self) -> int:
        """Stored bytes: packed codes, 16-bit scales, packed zeros where they are not implied."""
        zero_bits = 0 if self.symmetric else self.bits * self.zero.numel()
        return (self.bits * self.codes.numel() + 16 * self.scale.numel() + zero_bits + 7) // 8

    def rows(self, start: int, end: int) -> QTensor:
        """Outputs `start` to `end` (exclusive) as a QTensor of its own; shares memory."""
        codes, scale, zero = self.codes[start:end], self.scale[start:end], self.zero[start:end]
        return QTensor(codes, scale, zero, self.bits, self.symmetric)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W (N, K) in `dtype`: the product is taken in float32 (exact) and rounded once."""
        return dequantize(self.codes, self.scale, self.zero).to(dtype)


def group_size_of(scheme: Scheme, inputs: int) -> int:
    """The group size of `scheme` for a layer of K = `inputs`.

    :raises Unsupported: when it does not divide K.
    """
    size = scheme.group_size or inputs
    if inputs % size:
        message = f"group size `{size}` does not divide the layer's `{inputs}` inputs"
        raise Unsupported(message, hint="choose a group size that divides it, or keep the layer in float with an override")
    return size


def encode(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to nearest: weight (N, K), scale and zero (N, G) → codes (N, K) uint8."""
    rows, groups = scale.shape
    grouped = weight.reshape(rows, groups, -1)
    codes = torch.round(grouped / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8).reshape(weight.shape)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """codes (N, K), scale and zero (N, G) → W (N, K) float32."""
    rows, groups = scale.shape
    grouped = codes.reshape(rows, groups, -1).float()
    return grouped.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).reshape(codes.shape)


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest scale ≥ `scale` (any shape, float32, > 0) that is exact in fp16 and, in a bf16 artifact, in bf16 too.

    Below 2⁻¹⁶ fp16 has at most 8 significant bits, so what fp16 holds there bf16 holds as well. Scales end at the largest
    number of that kind, `LARGEST_SCALE[dtype]`, or 65504: no model has weights that large.
    """
    scale = scale.clamp(2.0**-24, LARGEST_SCALE.get(dtype, 65504.0))
    if dtype == torch.bfloat16:
        scale = _round_up(scale, torch.bfloat16)
    return _round_up(scale, torch.float16)


def _round_up(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive float32 → the smallest number of `dtype` that is not below it, as float32."""
    rounded = value.to(dtype)
    following = (rounded.view(torch.int16) + 1).view(dtype)
    return torch.where(rounded.float() < value, following, rounded).float()
