"""What a rounded network is measured against: the float network, on items that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qhub import TorchGraph
from qhub_qat.items import Items, Part
from qhub_qat.loss import EMBEDDING, distance, first, right


@dataclass(frozen=True)
class Score:
    """`distance` from the float network (nats, or squared distance of embeddings); `drop_pct` of its accuracy, or of agreement with it."""

    distance: float
    drop_pct: float


class Teacher:
    """The float network, and what it makes of the items that are held back."""

    def __init__(self, graph: TorchGraph, held: Items, batch: int) -> None:
        self.network = by_channels_last(graph.with_layers({}).module)
        self.embedding = graph.outputs[0] == EMBEDDING
        with torch.no_grad():
            self.held = [(part, self(part[0])) for part in held.batches(batch)]

    def __call__(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The float network's first output."""
        with torch.no_grad():
            return first(self.network(*inputs))

    def score(self, network: nn.Module) -> Score:
        """How a network does on the items that are held back."""
        total, count, made_right, wanted_right = 0.0, 0, 0.0, 0.0
        with torch.no_grad():
            for part, wanted in self.held:
                made, size = first(network(*part[0])), len(wanted)
                total, count = total + size * float(distance(made, wanted, embedding=self.embedding)), count + size
                ours, theirs = self._right(made, wanted, part)
                made_right, wanted_right = made_right + ours, wanted_right + theirs
        return Score(total / max(count, 1), 100 * (wanted_right - made_right) / max(wanted_right, 1e-9))

    def _right(self, made: torch.Tensor, wanted: torch.Tensor, part: Part) -> tuple[float, float]:
        """What the two networks have right: by the labels, else by the float network itself."""
        if self.embedding:
            return float(nn.functional.cosine_similarity(made, wanted, dim=-1).sum()), float(len(made))
        labels = wanted.argmax(-1) if part[1] is None else part[1]
        return right(made, labels)[0], right(wanted, labels)[0]


def by_channels_last(network: Any) -> Any:  # noqa: ANN401 - a module, returned as it came
    """The network with its convolutions' weights as CPUs like them: channels last. Values and names stay."""
    return network.to(memory_format=torch.channels_last)


def laid_out(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures with their channels last, all else as it is."""
    return [one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one for one in inputs]
