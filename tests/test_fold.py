"""Folding by itself: what a fold may move, what it may not touch, and what ends up stored (whole blocks: tests/test_block.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qhub.quantize.fold import FoldedWeights
from qhub.quantize.observe import LayerGroup, Producer
from qhub.skeleton import BlockCall

DOWN = LayerGroup(("down",), 16, "down", Producer("up", torch.arange(16)))


class Leaky(nn.Module):
    """Two layers; a small share of what lies between them reaches the output, which a fold changes."""

    def __init__(self, share):
        super().__init__()
        self.share = share
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, hidden):
        middle = self.up(hidden)
        return self.down(middle) + self.share * middle


def leaky(share, dtype=torch.float32, *, probe=True):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = Leaky(share).to(dtype).requires_grad_(False)
        return FoldedWeights(module, dtype, (torch.randn(1, 20, 16), BlockCall((), {})) if probe else None)


SCALE = torch.exp2(torch.linspace(-2, 2, 16))


@pytest.mark.parametrize(
    ("share", "dtype", "folds"),
    [
        (0.0, torch.float32, True),
        (0.004, torch.float32, False),
        (0.0, torch.bfloat16, True),
        (0.004, torch.bfloat16, True),
        (0.1, torch.bfloat16, False),
    ],
    ids=["float32", "float32 that leaks", "bf16", "bf16 that leaks no more than rounding does", "bf16 that leaks"],
)
@torch.no_grad()
def test_a_fold_may_move_the_output_by_as_much_as_rounding_does(share, dtype, folds):
    floats = leaky(share, dtype)
    kept = {name: parameter.clone() for name, parameter in floats.module.named_parameters()}
    found = floats.fold(DOWN, SCALE)
    assert (found is not None) == folds
    if not folds:
        assert all(torch.equal(parameter, kept[name]) for name, parameter in floats.module.named_parameters())
        assert (floats.weights, floats.changed) == ({}, set())
        return
    assert torch.equal(found, SCALE)
    torch.testing.assert_close(floats.weight("down"), kept["down.weight"].float() * SCALE)
    torch.testing.assert_close(floats.weight("up"), kept["up.weight"].float() / SCALE.unsqueeze(1))
    assert floats.changed == {"up.bias"}
    assert torch.equal(floats.module.down.weight, floats.weight("down").to(dtype))


@torch.no_grad()
def test_without_a_probe_nobody_asks_what_a_fold_moves():
    floats = leaky(1.0, probe=False)
    assert floats.fold(DOWN, SCALE) is not None


@torch.no_grad()
def test_what_is_stored_is_what_folding_made_of_it():
    floats = leaky(0.0)
    floats.fold(DOWN, SCALE)
    for name in ("up.weight", "down.weight", "up.bias"):
        stored = torch.zeros(16, 16, dtype=torch.float16) if name.endswith("weight") else torch.zeros(16, dtype=torch.float16)
        assert torch.equal(floats.current(name, stored), floats.module.get_parameter(name).half())
    stored = torch.zeros(16)
    assert floats.current("down.bias", stored) is stored
