"""What a method has at hand while it rounds: the batches, how to round, and whom to ask whether a step helped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from qhub import Batch, Graph, QhubError
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


def not_finite(graph: Graph, tensor: str) -> QhubError:
    """What is said of a tensor that holds a number which is none."""
    who = ", ".join(f"`{op.layer or op.name}`" for op in graph.ops if tensor in op.inputs)
    message = f"tensor `{tensor}`, which {who} reads, holds numbers that are not finite on the calibration data"
    return QhubError(message, hint="check how the calibration items are normalised, and the weights of the layers before it")
