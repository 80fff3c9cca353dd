"""Weights of few bits, rounded so that the layer's output changes least: later columns make up for the errors of earlier ones.

GPTQ (arXiv 2210.17323) in its LDLQ form (QuIP, arXiv 2307.13304, theorem 6): with H = L Lᵀ columns are rounded from the last
to the first, column k after adding Σ_{j>k} (w_j − q_j) L[j, k] / L[k, k].
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qhub import QTensor, lower_factor, product, solve

_COLUMNS = 64  # columns rounded one by one before their errors are passed on in one matrix product
DAMPING = 0.01


def best_weight(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """weight (N, K) → the one that comes closest on rounded inputs to what it gives on exact ones: W E[x qᵀ] H⁻¹.

    gram (K, K) is the mean of q qᵀ for rounded inputs q, cross that of x qᵀ.
    """
    factor = lower_factor(gram, DAMPING)
    return weight if factor is None else weight + solve(factor, ((cross - gram).t() @ weight.t())).t()


def round_with_feedback(weight: torch.Tensor, tensor: QTensor, gram: torch.Tensor) -> QTensor:
    """Other codes for weight (N, K) on the grid of `tensor`; gram (K, K). The same codes where the gram does not factorise."""
    order = torch.argsort(gram.diagonal(), stable=True)
    factor = lower_factor(gram, DAMPING, order)
    if factor is None:
        return tensor
    codes = torch.empty_like(tensor.codes)
    codes[:, order] = _round_columns(weight[:, order].t().contiguous(), tensor, factor).t()
    return replace(tensor, codes=codes)


def _round_columns(columns: torch.Tensor, tensor: QTensor, factor: torch.Tensor) -> torch.Tensor:
    """columns (K, N) in the order of `factor` (K, K) → their codes (K, N) uint8."""
    scale, zero, top = tensor.scale[:, 0], tensor.zero[:, 0], (1 << tensor.bits) - 1
    feedback = factor / factor.diagonal()
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.zeros_like(columns)
    for start in reversed(range(0, len(columns), _COLUMNS)):
        end = min(start + _COLUMNS, len(columns))
        wanted = columns[start:end] + product(feedback[end:, start:end].t().contiguous(), errors[end:])
        for index in reversed(range(start, end)):
            code = (wanted[index - start] / scale).round_().add_(zero).clamp_(1, top)
            codes[index] = code.to(torch.uint8)
            errors[index] = columns[index] - (code - zero) * scale
            wanted[: index - start].addr_(feedback[index, start:index], errors[index])
    return codes
