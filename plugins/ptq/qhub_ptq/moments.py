"""What calibration says of a layer's input: its mean as it is and rounded, and the second moments that careful rounding needs.

A convolution's outputs are sums over its taps (one input channel at one place of the kernel); a tap is what the convolution
makes with a weight that is one there and zero elsewhere. So nothing of strides, padding or groups has to be known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qhub import ActivationGrid, Graph, Op

_ROWS = 2048  # of second moments: rows of inputs that are taken from one batch


def round_on(grid: ActivationGrid | None, x: torch.Tensor) -> torch.Tensor:
    """x of any shape as it is read back from the grid; None rounds nothing."""
    if grid is None:
        return x
    return ((x / grid.scale).round_().add_(grid.zero).clamp_(0, (1 << grid.bits) - 1).sub_(grid.zero)).mul_(grid.scale)


@dataclass
class Mean:
    """The mean over items, one for each shape that an item has: shape → (sum, count)."""

    sums: dict[tuple[int, ...], tuple[torch.Tensor, int]] = field(default_factory=dict)

    def add(self, op: Op, x: torch.Tensor) -> bool:
        """Take in a batch of what `op` reads: (B, C, …) for a convolution, (…, K) for a linear layer, whose rows are the items.

        False when a number in it is not finite.
        """
        items = x.reshape(-1, x.shape[-1]) if op.kind == "linear" else x
        total, count = self.sums.get(tuple(items.shape[1:]), (torch.zeros(()), 0))
        summed = total + items.sum(0)
        self.sums[tuple(items.shape[1:])] = (summed, count + len(items))
        return bool(torch.isfinite(summed).all())

    def output(self, graph: Graph, op: Op, weight: torch.Tensor) -> torch.Tensor:
        """The mean output (N,) of `op` with `weight`, without bias: exact, since the operation is linear."""
        total, places = torch.zeros(()), 0
        for sums, count in self.sums.values():
            made = graph.apply(op, weight, (sums / count).unsqueeze(0)).movedim(op.channel_axis, 0).flatten(1)
            total, places = total + made.sum(1) * count, places + made.shape[1] * count
        return total / max(places, 1)


@dataclass
class Moments:
    """Of one layer's input: means, and sums of products of taps (G, K, K) per group of a convolution, if asked for.

    `gram` are those of the rounded input with itself, `cross` those of the input with the rounded one.
    """

    exact: Mean = field(default_factory=Mean)
    rounded: Mean = field(default_factory=Mean)
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    rows: int = 0

    def add(self, op: Op, x: torch.Tensor, rounded: torch.Tensor) -> bool:
        """Take in a batch of inputs; False when a number in it is not finite."""
        self.rounded.add(op, rounded)
        return self.exact.add(op, x)

    def add_products(self, taps: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in taps (G, R, K), exact and rounded."""
        gram, cross = rounded.mT @ rounded, taps.mT @ rounded
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross
        self.rows += taps.shape[1]


def taps_of(graph: Graph, op: Op, x: torch.Tensor) -> torch.Tensor:
    """What each output is a sum over: (G, R, K) for G groups of outputs, at R places spread over the batch."""
    weight = graph.weight(op.layer or "")
    if op.kind == "linear":
        return _spread(x.reshape(-1, x.shape[-1])).unsqueeze(0)
    groups = x.shape[1] // weight.shape[1]
    return _conv_taps(graph, op, weight, x[:: max(1, len(x) // 16)], groups)


def _conv_taps(graph: Graph, op: Op, weight: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    count, at_once = weight[0].numel(), len(weight) // groups
    found = []
    for start in range(0, count, at_once):
        size = min(at_once, count - start)
        picks = torch.zeros(groups, at_once, count)
        picks[:, range(size), range(start, start + size)] = 1
        made = graph.apply(op, picks.reshape(weight.shape), x)  # (B, G·at_once, …)
        rows = made.movedim(1, -1).reshape(-1, groups, at_once)
        found.append(_spread(rows)[:, :, :size])
    return torch.cat(found, 2).transpose(0, 1).contiguous()


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """At most `_ROWS` of the rows, evenly spread and the same ones each time."""
    step = -(-len(rows) // _ROWS)
    return rows[:: max(step, 1)]
