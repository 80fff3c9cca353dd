"""The linear algebra that calibrated methods share; float32, pure functions.

`gram` H (K, K) is the mean of x xᵀ over the calibration tokens, `drift` (K, K) the mean of (x_float − x) xᵀ.
"""

from __future__ import annotations

import torch

_BLOCK = 512


def upper_factor(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor | None:
    """R (K, K) upper triangular with R Rᵀ = H + λI; λ starts at `damping` times the mean of diag H and grows until it factorises.

    Inputs that were never active get the mean on the diagonal. `gram` is not modified. None when even λ ≈ mean does not help.
    """
    mean = gram.diagonal().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return None
    while damping <= 1.0:
        damped = gram.clone()
        dead = damped.diagonal() == 0
        damped.diagonal().add_(damping * mean).masked_fill_(dead, float(mean))
        lower = _cholesky(damped.flip(0, 1))
        if lower is not None:
            return lower.flip(0, 1)
        damping *= 3
    return None


def _cholesky(matrix: torch.Tensor) -> torch.Tensor | None:
    """Lower Cholesky factor, blocked so that nearly all work is matrix products; overwrites `matrix`."""
    size = len(matrix)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        corner, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if int(info) != 0 or not bool(torch.isfinite(corner).all()):
            return None
        matrix[start:end, start:end] = corner
        if end < size:
            inverse = torch.linalg.solve_triangular(corner, torch.eye(end - start).to(matrix), upper=False)
            panel = matrix[end:, start:end] @ inverse.t()
            matrix[end:, start:end] = panel
            for row in range(end, size, _BLOCK):  # the lower triangle only
                stop = min(row + _BLOCK, size)
                matrix[row:stop, end:stop].addmm_(panel[row - end : stop - end], panel[: stop - end].t(), alpha=-1)
    return matrix.tril_()


def solve_right(right: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """X (N, K) with X (R Rᵀ) = `right` (N, K), for R upper triangular; blocked like the factorisation."""
    solution = right.clone()
    size = len(factor)
    starts = list(range(0, size, _BLOCK))
    corners = {
        start: torch.linalg.solve_triangular(
            factor[start : start + _BLOCK, start : start + _BLOCK],
            torch.eye(min(_BLOCK, size - start)).to(factor),
            upper=True,
        )
        for start in starts
    }
    for start in reversed(starts):  # Z Rᵀ = right, from the last columns back: Rᵀ is lower triangular
        end = min(start + _BLOCK, size)
        block = solution[:, start:end]
        if end < size:
            block = block - solution[:, end:] @ factor[start:end, end:].t()
        solution[:, start:end] = block @ corners[start].t()
    for start in starts:  # X R = Z, from the first columns on: R is upper triangular
        end = min(start + _BLOCK, size)
        block = solution[:, start:end]
        if start:
            block = block - solution[:, :start] @ factor[:start, start:end]
        solution[:, start:end] = block @ corners[start]
    return solution


def compensate(weight: torch.Tensor, drift: torch.Tensor, factor: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that comes closest, on the quantized model's inputs, to what `weight` gives on the float model's.

    W + (W·drift + residual)·H⁻¹: least squares over the calibration tokens; with `residual` (N, K) the layer also makes up
    for what the residual stream it adds to has lost so far. Source: the asymmetric calibration of GPTAQ
    (arXiv 2504.02692), here solved once before rounding instead of column by column.
    """
    wanted = weight @ drift
    return weight + solve_right(wanted if residual is None else wanted.add_(residual), factor)


def output_loss(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Mean squared output error of each row of a weight error: delta (N, K) → (N,)."""
    return ((delta @ gram) * delta).sum(1)
