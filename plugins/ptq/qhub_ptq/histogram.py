"""What a tensor's numbers look like: their extremes, and how many lie where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

BINS = 2048


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie in each of `BINS` bins of equal width between `low` ≤ 0 and `high` ≥ 0; counts (BINS,) float64."""

    low: float
    high: float
    counts: torch.Tensor

    @property
    def centers(self) -> torch.Tensor:
        """The middle of each bin, (BINS,) float64."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def histograms(watch: Callable[[], Iterable[Iterator[tuple[str, torch.Tensor]]]]) -> dict[str, Histogram]:
    """The histogram of every watched tensor; `watch` runs all batches, and is called twice: for the extremes, then for the counts.

    :raises ValueError: naming the tensor, when one holds a number that is not finite.
    """
    extremes: dict[str, tuple[float, float]] = {}
    for batch in watch():
        for name, tensor in batch:
            low, high = extremes.get(name, (0.0, 0.0))
            least, most = (float(number) for number in torch.aminmax(tensor))
            if not (abs(least) < float("inf") and abs(most) < float("inf")):
                raise ValueError(name)
            extremes[name] = min(low, least), max(high, most)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in extremes}
    for batch in watch():
        for name, tensor in batch:
            low, high = extremes[name]
            if high > low:
                counts[name] += torch.histc(tensor.float(), BINS, low, high).double()
    return {name: Histogram(*extremes[name], counts[name]) for name in extremes}


def merged(found: Mapping[str, Histogram], tensors: Iterable[str]) -> tuple[float, float]:
    """The extremes of several tensors together."""
    chosen = [found[name] for name in tensors]
    return min(one.low for one in chosen), max(one.high for one in chosen)
