"""What calibration sees at a layer's input: second moments, mean magnitudes, and what the quantized prefix has cost so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_STRIP = 512  # rows of a symmetric product that are computed at once


@dataclass
class InputStatistics:
    """Running sums over the tokens that a group of layers with K inputs reads (see `qhub.interfaces.Statistics`).

    `needs` holds "gram", "shortfall" and "abs_mean" as the quantizer asked.
    """

    inputs: int
    needs: frozenset[str]
    tokens: int = 0
    _gram: torch.Tensor | None = field(default=None, repr=False)
    _drift: torch.Tensor | None = field(default=None, repr=False)
    _wanted_output: torch.Tensor | None = field(default=None, repr=False)
    _abs_sum: torch.Tensor | None = field(default=None, repr=False)

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None = None, wanted: torch.Tensor | None = None) -> None:
        """Count a batch: inputs (…, K) of the quantized stream, and either the same tokens' inputs in the float model,
        or `wanted` (…, N): what the layer would have to put out for the float model's residual stream.
        """
        flat = inputs.reshape(-1, self.inputs)
        self.tokens += len(flat)
        if "abs_mean" in self.needs:
            magnitude = flat.abs().sum(0, dtype=torch.float32)
            self._abs_sum = magnitude if self._abs_sum is None else self._abs_sum.add_(magnitude)
        if "gram" in self.needs:
            self._gram = _add_square(self._gram, flat)
        if "shortfall" not in self.needs:
            return
        if wanted is not None:
            self._wanted_output = _add_product(self._wanted_output, wanted.reshape(len(flat), -1).to(flat.dtype), flat)
        elif float_inputs is not None:
            moved = float_inputs.reshape(-1, self.inputs).to(flat.dtype) - flat
            self._drift = _add_product(self._drift, moved, flat)

    def rescale(self, scale: torch.Tensor) -> None:
        """Account for an input scale (K,) folded into the producer after these statistics were taken."""
        scale = scale.float()
        for sums in (self._abs_sum, self._wanted_output):
            if sums is not None:
                sums.div_(scale)
        for matrix in (self._gram, self._drift):
            if matrix is not None:
                matrix.div_(scale).div_(scale.unsqueeze(1))

    def finish(self) -> InputStatistics:
        """Turn sums into means, in place; call once."""
        for matrix in (self._gram, self._drift, self._wanted_output, self._abs_sum):
            if matrix is not None:
                matrix.div_(max(self.tokens, 1))
        if self._gram is not None:
            _mirror(self._gram)
        return self

    @property
    def gram(self) -> torch.Tensor | None:
        """Σ x xᵀ / T, (K, K) float32; valid once finished."""
        return self._gram

    @property
    def drift(self) -> torch.Tensor | None:
        """Σ (x_float − x) xᵀ / T, (K, K) float32."""
        return self._drift

    @property
    def wanted_output(self) -> torch.Tensor | None:
        """Σ y xᵀ / T, (N, K) float32, for the output y that makes the residual stream after the layer the float model's."""
        return self._wanted_output

    @property
    def abs_mean(self) -> torch.Tensor | None:
        """Mean |x|, (K,) float32."""
        return self._abs_sum


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total + leftᵀ·right in float32, reusing the memory of `total`.

    bf16 inputs are multiplied as they are: the sum over a batch is taken in float32 and rounded once per batch.
    """
    if total is None:
        total = torch.zeros(left.shape[1], right.shape[1], device=left.device)
    if left.dtype == torch.float32:
        return total.addmm_(left.t(), right)
    return total.add_(left.t() @ right)


def _add_square(total: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """total + valuesᵀ·values, the lower triangle in strips; what lies right of a strip's last row is left alone."""
    size = values.shape[1]
    if total is None:
        total = torch.zeros(size, size, device=values.device)
    for start in range(0, size, _STRIP):
        end = min(start + _STRIP, size)
        _add_product(total[start:end, :end], values[:, start:end], values[:, :end])
    return total


def _mirror(matrix: torch.Tensor) -> None:
    """Copy the lower triangle of a (K, K) matrix to the upper one, strip by strip."""
    for start in range(0, len(matrix), _STRIP):
        end = min(start + _STRIP, len(matrix))
        corner = matrix[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        matrix[:start, start:end] = matrix[start:end, :start].t()
