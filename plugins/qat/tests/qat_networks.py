"""A small network, pictures in four classes that it tells apart, and jobs on them, for the tests of `qat`."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from qhub import GraphJob, Scheme, TorchGraph, inputs_of

SIZE = 8


class Small(nn.Module):
    """Two convolutions with batch norms, the second residual, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.linear(x.mean((2, 3)))


def pictures(count, seed=0):
    """count pictures (3, 8, 8) with labels: which colours and which half are bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    x = rng.normal(0, 0.8, (count, 3, SIZE, SIZE)).astype(np.float32)
    for index, label in enumerate(labels):
        x[index, label % 3] += 0.12 if label < 3 else -0.12
    return x, labels


@functools.cache
def trained():
    """The network after some training in float."""
    torch.manual_seed(0)
    model, (x, y) = Small(), pictures(256)
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def job_for(work, scheme="w4a4-static", *, count=96, labels=True, **changes):
    """(a job on the trained network and new pictures, what is told of its progress)."""
    x, y = pictures(count, seed=1)
    graph = TorchGraph.of(trained(), inputs_of({"x": x[:2]}), ("logits",))
    return job_of(graph, (x, y if labels else None), work, scheme, **changes)


def job_of(graph, data, work, scheme="w4a4-static", *, overrides=None, **changes):
    """(a job on `graph` and pictures with labels, the list that its progress is told to)."""
    (x, y), told, chosen = data, [], Scheme.parse(scheme)
    starts = range(0, len(x), 32)
    facts = {
        "graph": graph,
        "scheme": chosen,
        "scheme_of": lambda layer: (overrides or {}).get(layer, chosen),
        "calibration": lambda: ({"x": x[start : start + 32]} for start in starts),
        "labels": None if y is None else lambda: (y[start : start + 32] for start in starts),
        "drop_pct": lambda graph: 0.0,
        "max_drop_pct": 100.0,
        "work": work,
        "note": told.append,
        "progress": lambda done, of, what: told.append((done, of, what)),
    }
    return GraphJob(**{**facts, **changes}), told
