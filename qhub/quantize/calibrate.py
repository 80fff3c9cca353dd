"""What calibration sees at a layer's input: second moments, mean magnitudes, and how far the quantized prefix moved it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class InputStatistics:
    """Running sums over the tokens that a group of layers with K inputs reads (see `qhub.interfaces.Statistics`).

    `wanted` holds "gram" and "drift" as the quantizer asked.
    """

    inputs: int
    wanted: frozenset[str]
    tokens: int = 0
    _gram: torch.Tensor | None = field(default=None, repr=False)
    _drift: torch.Tensor | None = field(default=None, repr=False)
    _residual: torch.Tensor | None = field(default=None, repr=False)
    _abs_sum: torch.Tensor | None = field(default=None, repr=False)
    _finished: bool = False

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None = None, missed: torch.Tensor | None = None) -> None:
        """Count a batch: inputs (…, K) of the quantized stream, and the same tokens' inputs in the float model.

        `missed` (…, N) is how far the residual stream, before this layer adds to it, is behind the float model's.
        """
        flat = inputs.reshape(-1, self.inputs)
        self.tokens += len(flat)
        magnitude = flat.abs().sum(0, dtype=torch.float32)
        self._abs_sum = magnitude if self._abs_sum is None else self._abs_sum.add_(magnitude)
        if "gram" in self.wanted:
            self._gram = _accumulate(self._gram, flat, flat)
        if "drift" in self.wanted and float_inputs is not None:
            moved = float_inputs.reshape(-1, self.inputs).float() - flat.float()
            self._drift = _accumulate(self._drift, moved.to(flat.dtype), flat)
        if "drift" in self.wanted and missed is not None:
            self._residual = _accumulate(self._residual, missed.reshape(len(flat), -1).to(flat.dtype), flat)

    def rescale(self, scale: torch.Tensor) -> None:
        """Account for an input scale (K,) folded into the producer after these statistics were taken."""
        scale = scale.to(self.abs_mean)
        self.abs_mean.div_(scale)
        for matrix in (self._gram, self._drift):
            if matrix is not None:
                matrix.div_(scale).div_(scale.unsqueeze(1))
        if self._residual is not None:
            self._residual.div_(scale)

    def finish(self) -> InputStatistics:
        """Turn sums into means, in place; call once."""
        for matrix in (self._gram, self._drift, self._residual, self._abs_sum):
            if matrix is not None:
                matrix.div_(max(self.tokens, 1))
        self._finished = True
        return self

    @property
    def gram(self) -> torch.Tensor | None:
        """Σ x xᵀ / T, (K, K) float32."""
        return self._gram

    @property
    def drift(self) -> torch.Tensor | None:
        """Σ (x_float − x) xᵀ / T, (K, K) float32."""
        return self._drift

    @property
    def residual(self) -> torch.Tensor | None:
        """Σ (r_float − r) xᵀ / T, (N, K) float32, for the residual stream r that the layer's output is added to."""
        return self._residual

    @property
    def abs_mean(self) -> torch.Tensor:
        """Mean |x|, (K,) float32."""
        if self._abs_sum is None:
            self._abs_sum = torch.zeros(self.inputs)
        return self._abs_sum


def _accumulate(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total + leftᵀ·right in float32, reusing the memory of `total`.

    bf16 inputs are multiplied as they are: the sum over a batch is taken in float32 and rounded once per batch.
    """
    if left.dtype == torch.float32 and total is not None:
        return total.addmm_(left.t(), right)
    product = (left.t() @ right).float()
    return product if total is None else total.add_(product)
