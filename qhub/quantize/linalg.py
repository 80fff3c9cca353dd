"""The linear algebra that calibrated methods share; float32, pure functions.

`gram` H (K, K) is the mean of x xᵀ over the calibration tokens, `shortfall` (N, K) the mean of (y_float − y) xᵀ.
"""

from __future__ import annotations

import functools

import torch

_BLOCK = 512
_SMALL = 1 << 24  # multiplications below which a product is not worth a detour


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (M, K) @ right (K, N) in their dtype, float32 by oneDNN where torch has it.

    torch multiplies float32 matrices with MKL, which reached half of oneDNN's speed on an AMD Zen 5.
    """
    if left.dtype != torch.float32 or left.device.type != "cpu" or left.numel() * right.shape[1] < _SMALL or not _has_onednn():
        return left @ right
    turned = right.t() if right.is_contiguous() else right.t().contiguous()  # a part of a matrix falls to oneDNN's reference code
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), turned, None, "none", [], "")
    return found


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch was built with MKL and oneDNN, as x86 builds are, and lets oneDNN multiply matrices."""
    built = (torch.backends.mkl, torch.backends.mkldnn)
    return all(bool(part.is_available()) for part in built) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def lower_factor(gram: torch.Tensor, damping: float = 0.01, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """L (K, K) lower triangular with L Lᵀ = H + λI; λ starts at `damping` times the mean of diag H and grows until it factorises.

    With `order` (K,) int64, H's rows and columns are taken in that order. Inputs that were never active get the mean on the
    diagonal. `gram` is not modified. None when even λ ≈ mean does not help.
    """
    mean = gram.diagonal().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return None
    while damping <= 1.0:
        damped = gram.clone() if order is None else _in_order(gram, order)
        dead = damped.diagonal() == 0
        damped.diagonal().add_(damping * mean).masked_fill_(dead, float(mean))
        lower = _cholesky(damped)
        if lower is not None:
            return lower
        damping *= 3
    return None


def _in_order(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix (K, K) with rows and columns in `order`, made in strips: a second whole copy would be the peak of a run."""
    found = torch.empty_like(matrix)
    for start in range(0, len(matrix), _BLOCK):
        rows = matrix.index_select(0, order[start : start + _BLOCK])
        torch.index_select(rows, 1, order, out=found[start : start + _BLOCK])
    return found


def turned(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """matrixᵀ with its rows in `order`: whole rows are copied, which is much faster than picking columns."""
    return matrix.t().contiguous().index_select(0, order)


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
            panel = product(matrix[end:, start:end], _inverse(corner).t())
            matrix[end:, start:end] = panel
            for row in range(end, size, _BLOCK):  # the lower triangle only
                stop = min(row + _BLOCK, size)
                matrix[row:stop, end:stop].sub_(product(panel[row - end : stop - end], panel[: stop - end].t()))
    return matrix.tril_()


def solve(factor: torch.Tensor, right: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
    """X (K, N) with L Lᵀ X = `right` (K, N), for `factor` L (K, K) lower triangular; blocked like the factorisation.

    With `overwrite`, `right` must be contiguous and X takes its place.
    """
    solution = right if overwrite else right.clone(memory_format=torch.contiguous_format)
    size = len(factor)
    starts = list(range(0, size, _BLOCK))
    inverses = [_inverse(factor[start : start + _BLOCK, start : start + _BLOCK]) for start in starts]
    for start, inverse in zip(starts, inverses, strict=True):  # L Z = right, from the first rows on
        rows = solution[start : start + _BLOCK]
        if start:
            rows.sub_(product(factor[start : start + _BLOCK, :start], solution[:start]))
        rows.copy_(product(inverse, rows))
    for start, inverse in reversed(list(zip(starts, inverses, strict=True))):  # Lᵀ X = Z, from the last rows back
        end = min(start + _BLOCK, size)
        rows = solution[start:end]
        if end < size:
            rows.sub_(product(factor[end:, start:end].t(), solution[end:]))
        rows.copy_(product(inverse.t(), rows))
    return solution


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a small lower triangular matrix."""
    found: torch.Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    return found


def compensate(weight: torch.Tensor, shortfall: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The weight that comes closest, on the quantized model's inputs, to what the float model gives on its own.

    W + shortfall·H⁻¹: least squares over the calibration tokens, with `factor` of H as `lower_factor` gives it. Source: the
    asymmetric calibration of GPTAQ (arXiv 2504.02692), here solved once before rounding instead of column by column.
    """
    return weight + solve(factor, shortfall.t()).t()


def output_loss(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Mean squared output error of each row of a weight error: delta (N, K) → (N,)."""
    return product(delta, gram).mul_(delta).sum(1)
