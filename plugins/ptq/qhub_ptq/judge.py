"""How far a rounded network is from the float one on calibration items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qhub import Batch, Graph

_SMALL = 1e-12


@dataclass(frozen=True)
class Judge:
    """A few batches, and what the float network makes of them."""

    batches: Sequence[Batch]
    wanted: Sequence[tuple[torch.Tensor, ...]]

    @classmethod
    def of(cls, graph: Graph, batches: Sequence[Batch]) -> Judge:
        """What `graph` makes of `batches` is what is wanted."""
        return cls(batches, [graph.run(batch) for batch in batches])

    def error(self, graph: Graph) -> float:
        """The squared change of the outputs as a share of their squares, averaged over the outputs; infinite if any is not finite."""
        changes: list[list[tuple[float, float]]] = []
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            made = graph.run(batch)
            changes.append([_change(one, other) for one, other in zip(made, wanted, strict=True)])
        shares = [sum(up for up, _ in output) / max(sum(down for _, down in output), _SMALL) for output in zip(*changes, strict=True)]
        share = sum(shares) / max(len(shares), 1)
        return share if share == share else float("inf")


def _change(made: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    return float((made.double() - wanted.double()).square().sum()), float(wanted.double().square().sum())
