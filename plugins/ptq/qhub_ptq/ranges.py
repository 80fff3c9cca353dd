"""Which range of a tensor's numbers to keep: all of it, or less of it on a finer grid.

- `minmax` clips nothing.
- `percentile` keeps 99.99 % of the numbers.
- `mse` minimises the squared error of rounding and clipping together, as OCTAV and OpenVINO do: both ends are searched.
- `entropy` minimises the divergence of the rounded distribution from the distribution, as TensorRT's calibrator (Migacz 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from qhub import ActivationGrid
from qhub_ptq.histogram import BINS, Histogram

_STEPS = 24  # shares of each end that are tried
_KEPT = 0.9999
_FEWEST = 128  # bins that a range of `entropy` has at least
_THRESHOLDS = 128  # about as many are tried
Range = tuple[float, float]


def minmax(found: Histogram, bits: int, *, symmetric: bool) -> Range:
    """All of it."""
    return found.low, found.high


def percentile(found: Histogram, bits: int, *, symmetric: bool) -> Range:
    """What is left when the outermost 0.005 % on either side go (all of them on one side, if there is only one)."""
    sides = (found.low < 0) + (found.high > 0)
    allowed = float(found.counts.sum()) * (1 - _KEPT) / max(sides, 1)
    width = found.top / BINS
    below = int((found.counts.cumsum(0) <= allowed).sum())
    above = int((found.counts.flip(0).cumsum(0) <= allowed).sum())
    return max(found.low, below * width - found.top) if found.low < 0 else 0.0, min(found.high, found.top - above * width)


def mse(found: Histogram, bits: int, *, symmetric: bool) -> Range:
    """The ends of least expected squared error, each searched from all of it down to a third (a tenth for few bits)."""
    if found.high <= found.low:
        return found.low, found.high
    shares = torch.linspace(1.0, 0.3 if bits == 8 else 0.1, _STEPS, dtype=torch.float64)
    lows, highs = torch.meshgrid(shares * found.low, shares * found.high, indexing="ij")
    ends = torch.unique(torch.stack([lows.reshape(-1), highs.reshape(-1)]), dim=1)
    if symmetric:
        most = max(-found.low, found.high)
        ends = torch.stack([-shares * most, shares * most])
    errors = _squared_errors(found, ends, bits, symmetric=symmetric)
    low, high = ends[:, int(errors.argmin())].tolist()
    return low, high


def _squared_errors(found: Histogram, ends: torch.Tensor, bits: int, *, symmetric: bool) -> torch.Tensor:
    """ends (2, C) → the summed squared error of each candidate, (C,)."""
    grids = [grid_of((low, high), bits, symmetric=symmetric) for low, high in ends.t().tolist()]
    scale = torch.tensor([grid.scale for grid in grids], dtype=torch.float64).unsqueeze(1)
    zero = torch.tensor([grid.zero for grid in grids], dtype=torch.float64).unsqueeze(1)
    there = found.counts > 0
    centers, counts = found.centers[there].unsqueeze(0), found.counts[there].unsqueeze(0)
    rounded = ((centers / scale).round_().add_(zero).clamp_(0, 2**bits - 1) - zero) * scale
    return ((rounded - centers).square_() * counts).sum(1)


def entropy(found: Histogram, bits: int, *, symmetric: bool) -> Range:
    """The threshold for sizes whose rounded distribution is least far from the clipped one.

    The bin at zero counts as much as the next one, as in TensorRT's calibrator: what a ReLU has set to zero is rounded
    without error, and would outweigh everything else.
    """
    most = max(-found.low, found.high)
    if most <= 0:
        return found.low, found.high
    levels = 1 << (bits - 1) if found.low < 0 or symmetric else 1 << bits
    used = min(math.ceil(most / found.top * BINS), BINS)
    sizes = found.of_sizes()[:used]
    sizes[0] = sizes[1]
    candidates = range(min(max(levels, _FEWEST), used), used + 1, max(used // _THRESHOLDS, 1))
    best = min(candidates, key=lambda kept: _divergence(sizes, kept, levels))
    threshold = found.top * best / BINS
    return max(found.low, -threshold), min(found.high, threshold)


def _divergence(counts: torch.Tensor, kept: int, levels: int) -> float:
    """KL of the first `kept` bins (the rest added to the last) from the same bins averaged over `levels` steps."""
    clipped = counts[:kept].clone()
    clipped[-1] += counts[kept:].sum()
    step = (torch.arange(kept) * levels) // kept
    there = (counts[:kept] > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, step, counts[:kept])
    sizes = torch.zeros(levels, dtype=torch.float64).index_add_(0, step, there)
    spread = (sums / sizes.clamp_min(1))[step] * there
    p, q = clipped / clipped.sum().clamp_min(1e-12), spread / spread.sum().clamp_min(1e-12)
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp_min(1e-9)).log()).sum())


RANGES: Mapping[str, Callable[..., Range]] = {"mse": mse, "minmax": minmax, "percentile": percentile, "entropy": entropy}


def grid_of(ends: Range, bits: int, *, symmetric: bool) -> ActivationGrid:
    """The grid that holds low … high, zero exactly; symmetric: zero in the middle, as signed codes without a zero point want."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    top = (1 << bits) - 1
    if symmetric:
        half = 1 << (bits - 1)
        scale = max(-low, high) / (half - 1)
        return ActivationGrid(_positive(scale), half, bits)
    scale = _positive((high - low) / top)
    return ActivationGrid(scale, min(max(round(-low / scale), 0), top), bits)


def _positive(scale: float) -> float:
    """A scale as float32 holds it, never zero."""
    return float(torch.tensor(max(scale, 2.0**-24), dtype=torch.float32))
