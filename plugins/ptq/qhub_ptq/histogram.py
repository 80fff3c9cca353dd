"""What a tensor's numbers look like: their extremes, and how many lie where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

BINS = 2048  # on each side of zero


@dataclass
class Histogram:
    """How many numbers lie in each bin between −`top` and `top`; counts (2 · BINS,) float64.

    The extremes `low` ≤ 0 ≤ `high` are exact; `top` is the first one of size, doubled until nothing lies beyond.
    """

    low: float = 0.0
    high: float = 0.0
    top: float = 0.0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2 * BINS, dtype=torch.float64))

    @property
    def centers(self) -> torch.Tensor:
        """The middle of each bin, (2 · BINS,) float64."""
        return (torch.arange(2 * BINS, dtype=torch.float64) + 0.5 - BINS) * (self.top / BINS)

    def add(self, tensor: torch.Tensor) -> None:
        """Count the numbers of a tensor.

        :raises ValueError: when one is not finite.
        """
        low, high = (float(number) for number in torch.aminmax(tensor))
        most = max(-low, high)
        if not most < float("inf"):
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.top = self.top or most
        while most > self.top:
            self._widen()
        if self.top > 0:
            self.counts = self.counts + torch.histc(tensor.float(), 2 * BINS, -self.top, self.top).double()

    def _widen(self) -> None:
        """Make every bin twice as wide."""
        inner = self.counts.reshape(BINS, 2).sum(1)
        self.counts = torch.cat([torch.zeros(BINS // 2, dtype=torch.float64), inner, torch.zeros(BINS // 2, dtype=torch.float64)])
        self.top *= 2

    def of_sizes(self) -> torch.Tensor:
        """How many numbers have a size in each of the bins from 0 to `top`, (BINS,) float64."""
        return self.counts[BINS:] + self.counts[:BINS].flip(0)


def histograms(batches: Iterable[Iterator[tuple[str, torch.Tensor]]]) -> dict[str, Histogram]:
    """The histogram of every tensor that is watched.

    :raises ValueError: naming the tensor, when one holds a number that is not finite.
    """
    found: dict[str, Histogram] = {}
    for batch in batches:
        for name, tensor in batch:
            try:
                found.setdefault(name, Histogram()).add(tensor)
            except ValueError:
                raise ValueError(name) from None
    return found
