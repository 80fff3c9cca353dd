"""What a method has at hand while it rounds: the batches, how to round, and whom to ask whether a step helped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from qhub import Batch, Graph
from qhub_ptq.judge import Judge
from qhub_ptq.options import Settings


@dataclass(frozen=True)
class Calibration:
    """`batches` may be none, where a method needs none; the judge has a few of them."""

    batches: Sequence[Batch]
    settings: Settings
    judge: Judge

    def watch(self, graph: Graph, tensors: Collection[str]) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """The tensors of each batch."""
        return (graph.watch(batch, tensors) for batch in self.batches)
