"""Small networks, what they are fed, and jobs on them, for the tests of `ptq`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qhub import GraphInput, GraphJob, Scheme
from qhub.graph.torch_graph import TorchGraph

IMAGE = (GraphInput("x", (-1, 3, 8, 8), "float32"),)
ROWS = (GraphInput("x", (-1, 24), "float32"),)


def graph_of(model, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TorchGraph.of(model, inputs, ("y",))


def convolutions(seed=0, activation=nn.ReLU):
    """A convolution with a batch norm, a depthwise one, one of one place, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), activation(),
        nn.Conv2d(8, 16, 1), activation(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


class Normed(nn.Module):
    """A norm that two linear layers read, and a residual sum; some channels of the norm are much larger than others."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.first, self.norm = nn.Linear(24, 32), nn.LayerNorm(32)
        self.one, self.two, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        with torch.no_grad():
            self.norm.weight[::7] *= 40
            self.norm.bias.normal_()

    def forward(self, x):
        x = self.first(x)
        h = self.norm(x)
        return self.last(x + torch.tanh(self.one(h)) * self.two(h))


def images(batches=3, items=16, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(items, 3, 8, 8)).astype("float32")} for _ in range(batches)]


def rows(batches=3, items=32, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(items, 24)).astype("float32")} for _ in range(batches)]


def outputs(graph, batches):
    return torch.cat([graph.run(batch)[0] for batch in batches])


def error(graph, rounded, batches):
    """The relative change of the outputs."""
    wanted = outputs(graph, batches)
    return float((outputs(rounded, batches) - wanted).norm() / wanted.norm())


def job_for(graph, batches, scheme, **more):
    """A job for the whole graph; its loss is 100 times the relative change of the outputs."""
    chosen = Scheme.parse(scheme)
    job = GraphJob(
        graph=graph,
        scheme=chosen,
        scheme_of=lambda layer: chosen,
        calibration=lambda: iter(batches),
        labels=None,
        drop_pct=lambda rounded: 100 * error(graph, rounded, batches),
        max_drop_pct=1000.0,
        work=Path(),
        note=lambda text: None,
        progress=lambda done, total, what: None,
    )
    return replace(job, **more)
