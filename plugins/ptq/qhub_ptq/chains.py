"""Where a channel's size can be moved from what makes a tensor into who reads it, without changing what the network computes.

A layer or the gain of a norm makes the tensor, perhaps through a ReLU, and only layers read it: dividing the maker's channel by
s and multiplying the readers' inputs by s changes nothing for s > 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qhub import Graph, Op

Layers = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, slots=True)
class Chain:
    """`maker` makes `tensor` of `channels` channels, which the layers `readers` read and nobody else."""

    maker: Op
    tensor: str
    readers: tuple[Op, ...]
    channels: int


def chains(graph: Graph) -> Iterator[Chain]:
    """All chains; none has a layer that several operations share."""
    users: dict[str, list[Op]] = {}
    for op in graph.ops:
        for name in op.inputs:
            users.setdefault(name, []).append(op)
    uses = Counter(op.layer for op in graph.ops)
    for op in graph.ops:
        if op.layer is None or uses[op.layer] > 1 or (op.kind == "norm" and graph.bias(op.layer) is None):
            continue
        tensor, readers = op.name, users.get(op.name, [])
        while len(readers) == 1 and readers[0].kind == "clip" and readers[0].low == 0 and readers[0].high is None:
            tensor, readers = readers[0].name, users.get(readers[0].name, [])
        channels = len(graph.weight(op.layer))
        if readers and all(reader.has_weight and uses[reader.layer] == 1 and _takes(graph, reader, channels) for reader in readers):
            yield Chain(op, tensor, tuple(readers), channels)


def _takes(graph: Graph, reader: Op, channels: int) -> bool:
    """Whether the layer can read so many channels: as many as its weight has, or a multiple, for a convolution in groups."""
    taken = graph.weight(reader.layer or "").shape[1]
    return channels == taken if reader.kind == "linear" else channels % taken == 0


def multiplied(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight (N, C / groups, …) with each input channel multiplied by its `scale` (C,)."""
    groups = len(scale) // weight.shape[1]
    per_output = scale.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight * per_output.reshape(*per_output.shape, *(1,) * (weight.dim() - 2))


def input_sizes(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """The largest size among the weights of each input channel, (C,), for weight (N, C / groups, …)."""
    groups = channels // weight.shape[1]
    sizes = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
    return sizes.reshape(groups, -1, weight.shape[1]).amax(1).reshape(-1)


def folded(graph: Graph, scales: Mapping[Chain, torch.Tensor]) -> Graph:
    """The network with every chain's tensor divided by its scale (C,)."""
    changed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def current(layer: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return changed.get(layer) or (graph.weight(layer), graph.bias(layer))

    for chain, scale in scales.items():
        name = chain.maker.layer or ""
        weight, bias = current(name)
        changed[name] = (weight / scale.reshape(-1, *(1,) * (weight.dim() - 1)), None if bias is None else bias / scale)
        for reader in chain.readers:
            weight, bias = current(reader.layer or "")
            changed[reader.layer or ""] = (multiplied(weight, scale), bias)
    return graph.with_layers(changed)
