"""Where the grid lies: scale and zero of each group of weights, from its extremes or by searching for the least error.

Pure functions on weight (N, K) float32; results are scale and zero (N, G) float32 that every format carries exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qhub.quantize.linalg import output_loss, product
from qhub.quantize.qtensor import QTensor, encode, group_size_of, round_scale
from qhub.types import Scheme

_SMALLEST = 2.0**-24
_SEARCHED_AT_ONCE = 1 << 17  # weights: what a search touches again and again stays in the cache
_ROUNDED_AT_ONCE = 1 << 19  # weights
_FITTED_ROWS = 1024


@dataclass(frozen=True)
class Grid:
    """scale (N, G) float32 > 0 and zero (N, G) float32, integers ≥ 1."""

    scale: torch.Tensor
    zero: torch.Tensor


def range_grid(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, low_share: float, high_share: float) -> Grid:
    """The grid from `low_share` of each group's lowest weight to `high_share` of its highest."""
    low, high = _extremes(weight, scheme)
    return _fit(low * low_share, high * high_share, scheme, dtype)


def minmax_grid(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The smallest grid that clips nothing."""
    return range_grid(weight, scheme, dtype, 1.0, 1.0)


def search_grid(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, importance: torch.Tensor, *, steps: int = 12) -> Grid:
    """The grid of least weighted squared error: ranges shrunk in `steps` steps to one half, then least-squares scales.

    importance (K,) ≥ 0 weighs each input's error, e.g. the mean square of that input. Never worse than `minmax_grid` in
    that measure. Source: clip search of AWQ (arXiv 2306.00978) and scale search of ggml's k-quants.
    """
    found = []
    for start, end in _pieces(len(weight), max(1, _SEARCHED_AT_ONCE // weight.shape[1])):
        rows = weight[start:end]
        search = _Search(rows, scheme, dtype, importance)
        low, high = _extremes(rows, scheme)
        for step in range(steps):
            share = 1 - 0.5 * step / steps
            search.try_grid(_fit(low * share, high * share, scheme, dtype))
        for _ in range(2):
            search.try_grid(search.least_squares())
        found.append(search)
    return Grid(torch.cat([search.scale for search in found]), torch.cat([search.zero for search in found]))


def quantize_rtn(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QTensor:
    """Round to nearest on the min-max grid; weight (N, K) float32, not modified; `dtype` is the artifact's."""
    found = []
    for start, end in _pieces(len(weight), max(1, _ROUNDED_AT_ONCE // weight.shape[1])):
        rows = weight[start:end]
        found.append(on_grid(rows, minmax_grid(rows, scheme, dtype), scheme))
    codes, scale, zero = (torch.cat(parts) for parts in zip(*((one.codes, one.scale, one.zero) for one in found), strict=True))
    return QTensor(codes, scale, zero, scheme.weight_bits, scheme.symmetric)


def on_grid(weight: torch.Tensor, grid: Grid, scheme: Scheme) -> QTensor:
    """Round weight (N, K) to the nearest points of `grid`."""
    codes = encode(weight, grid.scale, grid.zero, scheme.weight_bits)
    return QTensor(codes, grid.scale, grid.zero, scheme.weight_bits, scheme.symmetric)


def _grouped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    size = group_size_of(scheme, weight.shape[1])
    return weight.reshape(weight.shape[0], -1, size)


def _extremes(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) of each group, (N, G): low ≤ 0 ≤ high; symmetric: −low = high."""
    grouped = _grouped(weight, scheme)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _fit(low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid that spans low … high."""
    top = 2**scheme.weight_bits - 1
    if scheme.symmetric:
        zero = torch.full_like(low, 2.0 ** (scheme.weight_bits - 1))
        return Grid(round_scale((high / (top - zero)).clamp_min(_SMALLEST), dtype), zero)
    scale = ((high - low) / top).clamp_min(_SMALLEST)
    # zero ≥ 1 for the formats that store zero − 1: a group with (almost) no negative weights gives up one code for it
    wanted = torch.round(-low / scale)
    zero = wanted.clamp(1, top)
    room = high / (top - zero + 0.5)  # the last code may be half a step away, as any other
    return Grid(round_scale(torch.where(wanted < 1, torch.maximum(scale, room), scale), dtype), zero)


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of `size` rows."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


class _Search:
    """The best grid so far, group by group."""

    def __init__(self, weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, importance: torch.Tensor) -> None:
        self.grouped = _grouped(weight, scheme)
        self.importance = importance.reshape(1, self.grouped.shape[1], -1)
        self.top = 2**scheme.weight_bits - 1
        self.dtype = dtype
        self.error = torch.full(self.grouped.shape[:2], float("inf"), device=weight.device)
        self.scale = torch.ones_like(self.error)
        self.zero = torch.ones_like(self.error)

    def try_grid(self, grid: Grid) -> None:
        """Keep `grid` in the groups where it is better."""
        shifted = self._shifted_codes(grid)
        error = (shifted.mul_(grid.scale.unsqueeze(-1)).sub_(self.grouped).square_() * self.importance).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, grid.scale, self.scale)
        self.zero = torch.where(better, grid.zero, self.zero)

    def least_squares(self) -> Grid:
        """The scales that fit today's codes best; same zeros."""
        shifted = self._shifted_codes(Grid(self.scale, self.zero))
        weighted = shifted * self.importance
        fitted = (weighted * self.grouped).sum(-1) / weighted.mul_(shifted).sum(-1).clamp_min(1e-30)
        usable = fitted > 0.5 * self.scale
        return Grid(torch.where(usable, round_scale(fitted.clamp_min(_SMALLEST), self.dtype), self.scale), self.zero)

    def _shifted_codes(self, grid: Grid) -> torch.Tensor:
        """codes − zero, (N, G, group_size) float32."""
        zero = grid.zero.unsqueeze(-1)
        return torch.round(self.grouped / grid.scale.unsqueeze(-1)).clamp_(-zero, self.top - zero)


def fit_scales(weight: torch.Tensor, tensor: QTensor, gram: torch.Tensor, dtype: torch.dtype) -> Grid:
    """The scales of least output error for fixed codes: a G×G least-squares problem per row under `gram` (K, K).

    weight (N, K) float32. Zeros stay. A scale that would move by more than a factor of two stays as it is.
    """
    parts = []
    for start, end in _pieces(len(weight), _FITTED_ROWS):
        parts.append(_fit_rows(weight[start:end], tensor.rows(start, end), gram))
    fitted = torch.cat(parts)
    usable = (fitted > 0.5 * tensor.scale) & (fitted < 2 * tensor.scale)
    return Grid(torch.where(usable, round_scale(fitted.clamp_min(_SMALLEST), dtype), tensor.scale), tensor.zero)


def _fit_rows(weight: torch.Tensor, tensor: QTensor, gram: torch.Tensor) -> torch.Tensor:
    """The scales (N, G) that solve the rows' normal equations, with a slight pull to those they have."""
    rows, groups = tensor.scale.shape
    size = tensor.group_size
    flat = (tensor.codes.reshape(rows, groups, -1).float() - tensor.zero.unsqueeze(-1)).reshape(weight.shape)
    right = product(weight, gram).mul_(flat).reshape(rows, groups, -1).sum(-1)
    left = torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):  # symmetric: only from the diagonal on
        start = group * size
        products = product(flat[:, start : start + size], gram[start : start + size, start:]).mul_(flat[:, start:])
        left[:, group, group:] = products.reshape(rows, groups - group, size).sum(-1)
        left[:, group + 1 :, group] = left[:, group, group + 1 :]
    ridge = 1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-20)
    left.diagonal(dim1=1, dim2=2).add_(ridge)
    solved: torch.Tensor = torch.linalg.solve(left, right.add_(ridge * tensor.scale).unsqueeze(-1)).squeeze(-1)
    return solved


def better_rows(weight: torch.Tensor, gram: torch.Tensor, one: QTensor, other: QTensor) -> QTensor:
    """Row by row the one of two quantizations of `weight` (N, K) with the smaller output error under `gram` (K, K)."""
    losses = [output_loss(tensor.dequantize().sub_(weight), gram) for tensor in (one, other)]
    return pick_rows(one, other, losses[1] < losses[0])


def pick_rows(one: QTensor, other: QTensor, take_other: torch.Tensor) -> QTensor:
    """`other` in the rows where `take_other` (N,) bool says so, else `one`."""
    pick = take_other.unsqueeze(1)
    codes = torch.where(pick, other.codes, one.codes)
    scale, zero = torch.where(pick, other.scale, one.scale), torch.where(pick, other.zero, one.zero)
    return QTensor(codes, scale, zero, one.bits, one.symmetric)
