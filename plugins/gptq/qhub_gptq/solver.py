"""Rounding with error feedback: GPTQ's maths as pure functions.

GPTQ (arXiv 2210.17323) pushes each column's rounding error onto the columns that follow, using the inverse Hessian. With
H = R Rᵀ (R upper triangular) the same numbers come from feedback F = R / diag(R) and need no inverse: column k is rounded
after adding Σ_{j<k} (w_j − q_j) F[j, k] (LDLQ; equivalence: QuIP, arXiv 2307.13304, theorem 6).
"""

from __future__ import annotations

import torch

from qhub import Grid, upper_factor

_COLUMNS = 64  # columns rounded one by one before their errors are passed on in one matrix product


def round_with_feedback(weight: torch.Tensor, grid: Grid, gram: torch.Tensor, bits: int, damping: float) -> torch.Tensor | None:
    """Codes (N, K) uint8 for weight (N, K) on a fixed grid, so that the output error under `gram` (K, K) is small.

    Columns are rounded in the order of decreasing activation energy, on scales of their place in the original layout: the
    artifact needs no permutation. None when the Hessian does not factorise.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = upper_factor(gram[order][:, order], damping)
    if factor is None:
        return None
    factor.div_(factor.diagonal().clone())
    group_of = order // (weight.shape[1] // grid.scale.shape[1])
    columns = weight.t()[order].contiguous()  # (K, N): one column of the weight is one row here
    scale, zero = grid.scale.t()[group_of].contiguous(), grid.zero.t()[group_of].contiguous()
    codes = _round_columns(columns, scale, zero, factor, 2**bits - 1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.t().contiguous()


def _round_columns(columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor, top: int) -> torch.Tensor:
    """columns, scale, zero (K, N) in rounding order; factor (K, K) unit upper triangular → codes (K, N) uint8."""
    count = len(columns)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    errors = torch.empty_like(columns)
    for start in range(0, count, _COLUMNS):
        end = min(start + _COLUMNS, count)
        wanted = columns[start:end].clone()
        if start:
            wanted.addmm_(factor[:start, start:end].t(), errors[:start])
        for index in range(start, end):
            code = (wanted[index - start] / scale[index]).round_().add_(zero[index]).clamp_(0, top)
            codes[index] = code
            error = torch.addcmul(columns[index], code.sub_(zero[index]), scale[index], value=-1)
            errors[index] = error
            if index + 1 < end:
                wanted[index - start + 1 :].addr_(factor[index, index + 1 : end], error)
    return codes
