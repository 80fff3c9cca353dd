"""The items a network is trained on: all in memory, some held back, pictures moved and mirrored a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from qhub import Batch, GraphJob

#: The inputs of some items in the network's order, and their labels if there are any.
Part = tuple[list[torch.Tensor], torch.Tensor | None]
_MOST_HELD = 1000


@dataclass(frozen=True)
class Items:
    """`parts` of one shape each; where items differ in shape (texts) a part is a batch as it was fed, else there is one part."""

    parts: list[Part]

    @classmethod
    def of(cls, job: GraphJob) -> Items:
        """All calibration items of a job."""
        names = [item.name for item in job.graph.inputs]
        batches = [_tensors(batch, names) for batch in job.calibration()]
        labels: list[torch.Tensor | None] = (
            [None] * len(batches) if job.labels is None else [torch.from_numpy(np.asarray(one)).long() for one in job.labels()]
        )
        return cls(_joined(list(zip(batches, labels, strict=True))))

    @property
    def count(self) -> int:
        """How many items there are."""
        return sum(len(inputs[0]) for inputs, _ in self.parts)

    def split(self, share: float) -> tuple[Items, Items]:
        """(to train on, held back): every so manieth item, or part, is held back; with a share of 0 both are all items."""
        if share == 0 or self.count < 2:
            return self, self
        every = max(2, round(1 / max(min(share, _MOST_HELD / self.count), 1e-6)))
        if len(self.parts) > 1:
            every = min(every, len(self.parts))
            held = [part for index, part in enumerate(self.parts) if index % every == every - 1]
            return Items([part for index, part in enumerate(self.parts) if index % every != every - 1]), Items(held)
        every = min(every, self.count)
        back = torch.arange(self.count) % every == every - 1
        return Items([_picked(self.parts[0], ~back)]), Items([_picked(self.parts[0], back)])

    def batches(self, size: int, order: torch.Generator | None = None) -> Iterator[Part]:
        """All items, `size` at a time; in an order drawn from `order`."""
        numbers = [(index, chosen) for index, (inputs, _) in enumerate(self.parts) for chosen in _drawn(len(inputs[0]), size, order)]
        places = range(len(numbers)) if order is None else torch.randperm(len(numbers), generator=order).tolist()
        for place in places:
            index, chosen = numbers[place]
            yield _picked(self.parts[index], chosen)


def _drawn(count: int, size: int, order: torch.Generator | None) -> list[torch.Tensor]:
    numbers = torch.arange(count) if order is None else torch.randperm(count, generator=order)
    return list(torch.split(numbers, size))


def _tensors(batch: Batch, names: list[str]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(batch[name])) for name in names]


def _joined(parts: list[Part]) -> list[Part]:
    """One part, if all items have one shape."""
    shapes = {tuple(tensor.shape[1:] for tensor in inputs) for inputs, _ in parts}
    if len(shapes) != 1:
        return parts
    inputs = [torch.cat(tensors) for tensors in zip(*(inputs for inputs, _ in parts), strict=True)]
    labels = [label for _, label in parts if label is not None]
    return [(inputs, torch.cat(labels) if labels else None)]


def _picked(part: Part, chosen: torch.Tensor) -> Part:
    inputs, labels = part
    return [tensor[chosen] for tensor in inputs], None if labels is None else labels[chosen]


def augmentation(items: Items, wanted: str) -> Callable[[list[torch.Tensor], torch.Generator], list[torch.Tensor]]:
    """What is done to a batch of inputs: pictures (B, 1 or 3, H, W) are moved by up to H / 8, those in colour also mirrored."""
    shapes = {tuple(tensor.shape[1:]) for inputs, _ in items.parts for tensor in inputs[:1] if tensor.is_floating_point()}
    pictures = bool(shapes) and all(len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8 for shape in shapes)
    if wanted == "off" or not pictures:
        return lambda inputs, _: inputs
    return lambda inputs, order: [moved(inputs[0], order), *inputs[1:]]


def moved(pictures: torch.Tensor, order: torch.Generator) -> torch.Tensor:
    """pictures (B, C, H, W), each moved by up to H / 8 and, if in colour, mirrored one time in two; what comes in is mirrored."""
    count, channels, height, width = pictures.shape
    room = height // 8
    padded = functional.pad(pictures, (room, room, room, room), mode="reflect")
    top, left = torch.randint(0, 2 * room + 1, (2, count, 1), generator=order)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if channels == 3:
        mirrored = torch.rand(count, 1, generator=order) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    chosen = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return chosen.permute(0, 3, 1, 2)
