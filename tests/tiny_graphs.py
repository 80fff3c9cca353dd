"""Small networks as graphs, and the plainest way of rounding them, for tests of files and engines."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qhub.graph.placement import place
from qhub.graph.torch_graph import TorchGraph
from qhub.graph.values import ActivationGrid, Batch, GraphInput, Quantization
from qhub.interfaces import Graph
from qhub.quantize.qtensor import QTensor


class Residual(nn.Module):
    """Convolutions with ReLU, a shortcut that is cut out and padded, average pooling and a linear layer: what ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = (self.third(self.second(x).relu()) + short).relu()
        return self.linear(x.mean((2, 3)))


class Encoder(nn.Module):
    """One transformer layer on embeddings, of linear layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(ids))
        scores = self.query(x) @ self.key(x).transpose(1, 2) + (1.0 - mask.float())[:, None] * -1e4
        x = x + self.down(nn.functional.gelu(self.up(scores.softmax(-1) @ x)))
        return self.head(x[:, 0])


def residual() -> tuple[TorchGraph, Batch]:
    """The image network and a batch."""
    graph = TorchGraph.of(Residual(), (GraphInput("image", (-1, 3, 8, 8), "float32"),), ("logits",))
    return graph, {"image": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}


def encoder() -> tuple[TorchGraph, Batch]:
    """The text network and a batch."""
    inputs = (GraphInput("ids", (-1, -1), "int64"), GraphInput("mask", (-1, -1), "int64"))
    ids = np.random.default_rng(0).integers(0, 50, (3, 6))
    return TorchGraph.of(Encoder(), inputs, ("logits",)), {"ids": ids, "mask": np.ones_like(ids)}


def round_to_nearest(weight: torch.Tensor, bits: int = 8) -> QTensor:
    """Symmetric codes per output."""
    rows, half = weight.reshape(len(weight), -1), 1 << (bits - 1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=2.0**-20) / (half - 1)
    codes = (torch.round(rows / scale) + half).clamp(0, 2 * half - 1).to(torch.uint8)
    return QTensor(codes, scale, torch.full_like(scale, half), bits, True)


def static(graph: Graph, batch: Batch, bits: tuple[int, int] = (8, 8), *, symmetric: bool = False) -> Quantization:
    """Weights and activations to `bits`, with the ranges of one batch."""
    points = place(graph.ops)
    seen = dict(graph.watch(batch, [point.tensor for point in points if point.like is None]))
    grids = {name: _grid(tensor, bits[1], symmetric=symmetric) for name, tensor in seen.items()}
    weights = {op.layer: round_to_nearest(graph.weight(op.layer), bits[0]) for op in graph.ops if op.layer and op.has_weight}
    activations = {point.tensor: grids[point.like or point.tensor] for point in points}
    return Quantization(weights, activations, {point.tensor: point.readers for point in points})


def _grid(tensor: torch.Tensor, bits: int, *, symmetric: bool) -> ActivationGrid:
    low, high = min(float(tensor.min()), 0.0), max(float(tensor.max()), 1e-6)
    if symmetric:
        return ActivationGrid(max(-low, high) / ((1 << (bits - 1)) - 1), 1 << (bits - 1), bits)
    scale = (high - low) / ((1 << bits) - 1)
    return ActivationGrid(scale, round(-low / scale), bits)


def dynamic(graph: Graph, bits: int = 8) -> Quantization:
    """Linear layers whose input is rounded while they run."""
    layers = [op.layer for op in graph.ops if op.kind == "linear" and op.layer]
    return Quantization({layer: round_to_nearest(graph.weight(layer), bits) for layer in layers}, dynamic=frozenset(layers))
