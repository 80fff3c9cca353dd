"""Rounding with error feedback: GPTQ's maths as pure functions.

GPTQ (arXiv 2210.17323) pushes each column's rounding error onto the columns that follow, using the inverse Hessian. With
H = L Lᵀ (L lower triangular) the same numbers come from feedback F = L / diag(L) and need no inverse: columns are rounded
from the last to the first, column k after adding Σ_{j>k} (w_j − q_j) F[j, k] (LDLQ; equivalence: QuIP, arXiv 2307.13304,
theorem 6). What is then left over of column k, e_k, says how good the result is: the output error is Σ_k (L[k, k] e_k)².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qhub import Grid, lower_factor, product, solve, turned

_COLUMNS = 64  # columns rounded one by one before their errors are passed on in one matrix product


@dataclass(frozen=True)
class Hessian:
    """The damped second moments H of a layer's inputs, factored so that the most active input is rounded first.

    order (K,) int64, activation energy increasing; factor L (K, K) float32 lower triangular: H[order][:, order] = L Lᵀ.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float) -> Hessian | None:
        """From `gram` (K, K); None when it does not factorise."""
        order = torch.argsort(gram.diagonal(), descending=True, stable=True).flip(0)
        factor = lower_factor(gram, damping, order)
        return None if factor is None else cls(order, factor)

    def compensate(self, weight: torch.Tensor, shortfall: torch.Tensor) -> torch.Tensor:
        """`qhub.compensate` for weight and shortfall (N, K) as they lie in the model."""
        change = torch.empty_like(shortfall.t(), memory_format=torch.contiguous_format)
        change[self.order] = solve(self.factor, turned(shortfall, self.order), overwrite=True)
        return weight + change.t()


def round_with_feedback(weight: torch.Tensor, grid: Grid, hessian: Hessian, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) uint8 for weight (N, K) on a fixed grid, and each row's output error (N,) under the damped H.

    Columns are rounded on scales of their place in the original layout: the artifact needs no permutation.
    """
    order = hessian.order
    places = (order // (weight.shape[1] // grid.scale.shape[1])).tolist()
    groups = [(scale, zero) for scale, zero in zip(grid.scale.t().contiguous(), grid.zero.t().contiguous(), strict=True)]
    codes, loss = _round_columns(turned(weight, order), [groups[place] for place in places], hessian.factor, 2**bits - 1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.t().contiguous(), loss


def _round_columns(
    columns: torch.Tensor, grids: list[tuple[torch.Tensor, torch.Tensor]], factor: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """columns (K, N), their (scale, zero), each (N,), and factor (K, K) → codes (K, N) uint8 and the error of each row (N,).

    One column of the weight is one row here.
    """
    count, diagonal = len(columns), factor.diagonal()
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    loss = torch.zeros_like(columns[0])
    for start in reversed(range(0, count, _COLUMNS)):
        end = min(start + _COLUMNS, count)
        feedback = factor[start:, start:end] / diagonal[start:end]
        wanted = columns[start:end].clone()
        if end < count:
            wanted.add_(product(feedback[end - start :].t(), errors[end:]))
        for index in reversed(range(start, end)):
            (scale, zero), place = grids[index], index - start
            code = (wanted[place] / scale).round_().add_(zero).clamp_(0, top)
            codes[index] = code
            rounded = code.sub_(zero).mul_(scale)
            torch.sub(columns[index], rounded, out=errors[index])
            if place:
                wanted[:place].addr_(feedback[place, :place], errors[index])
            wanted[place].sub_(rounded)
        loss += wanted.mul_(diagonal[start:end].unsqueeze(1)).square_().sum(0)
    return codes, loss
