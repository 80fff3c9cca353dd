"""AWQ's clip search on what counts, the layer's output error: group after group, given the errors that all others make."""

from __future__ import annotations

from itertools import product as pairs

import torch

from qhub import QTensor, Scheme, encode, lower_factor, pick_rows, product, range_grid, solve

SHARES = (1.0, 0.9, 0.8, 0.7)  # of a range's lower and upper end that are tried


def descend(weight: torch.Tensor, start: QTensor, gram: torch.Tensor, scheme: Scheme, dtype: torch.dtype, sweeps: int) -> QTensor:
    """Coordinate descent from `start` on the output error of weight (N, K) under `gram` (K, K); never worse than `start`.

    A group of inputs is rounded again to nearest, now of the values that would make up best for the errors of the other
    groups, on ranges clipped at either end; each row keeps what is best. The most active groups come first, `sweeps` times.
    """
    size, count = start.group_size, start.scale.shape[1]
    codes, scale, zero = start.codes.clone(), start.scale.clone(), start.zero.clone()
    error = start.dequantize().sub_(weight)
    slope = product(error, gram)  # half the gradient of the output error, (N, K)
    order = gram.diagonal().reshape(count, size).sum(1).argsort(descending=True, stable=True).tolist()
    for group in order * sweeps:
        part = slice(group * size, (group + 1) * size)
        now = QTensor(codes[:, part], scale[:, group : group + 1], zero[:, group : group + 1], start.bits, start.symmetric)
        others = slope[:, part] - product(error[:, part], gram[part, part])
        best = _best_group(weight[:, part], now, others, gram[part, part], scheme, dtype)
        codes[:, part], scale[:, group], zero[:, group] = best.codes, best.scale[:, 0], best.zero[:, 0]
        change = best.dequantize().sub_(weight[:, part]).sub_(error[:, part])
        error[:, part] += change
        slope += product(change, gram[part])
    return QTensor(codes, scale, zero, start.bits, start.symmetric)


def _best_group(
    weight: torch.Tensor, now: QTensor, others: torch.Tensor, gram: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> QTensor:
    """The best of `now` and its alternatives for one group of weights (N, k), whose inputs have second moments `gram` (k, k).

    others (N, k) is half the gradient that the other groups' errors leave here.
    """
    factor = lower_factor(gram)
    target = weight if factor is None else weight - solve(factor, others.t()).t()
    best, least = now, _loss(now.dequantize().sub_(weight), others, gram)
    ends = [(share, share) for share in SHARES] if scheme.symmetric else list(pairs(SHARES, SHARES))
    for grid in (*(range_grid(target, scheme, dtype, low, high) for low, high in ends), now):
        found = QTensor(encode(target, grid.scale, grid.zero, now.bits), grid.scale, grid.zero, now.bits, now.symmetric)
        loss = _loss(found.dequantize().sub_(weight), others, gram)
        best, least = pick_rows(best, found, loss < least), torch.minimum(loss, least)
    return best


def _loss(error: torch.Tensor, others: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """What a group's error (N, k) adds to each row's output error, (N,)."""
    return product(error, gram).add_(others, alpha=2).mul_(error).sum(1)
