"""What a tap sees of a layer, and a finished child that gives what it would have given (whole blocks: tests/test_block.py)."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn

from qhub.quantize.calibrate import InputStatistics
from qhub.quantize.observe import Closing
from qhub.quantize.taps import Replay, Tap
from qhub.skeleton import Enough
from qhub.spool import Spool


class Child(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.first, self.last, self.outputs, self.calls = nn.Linear(8, width), nn.Linear(width, 8), outputs, 0

    def forward(self, hidden, *, factor=1.0):
        self.calls += 1
        result = self.last(self.first(hidden) * factor)
        return (result, *[None] * (self.outputs - 1)) if self.outputs else result


class Block(nn.Module):
    """A child whose output is added to the stream."""

    def __init__(self, width=8, outputs=0):
        super().__init__()
        self.norm, self.child = nn.LayerNorm(8), Child(width, outputs)

    def forward(self, hidden):
        output = self.child(self.norm(hidden), factor=2.0)
        return hidden + (output[0] if self.child.outputs else output)


@pytest.fixture
def block():
    def make(*args):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Block(*args).requires_grad_(False)

    return make


BATCHES = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def new_statistics():
    return InputStatistics(8, frozenset({"gram", "shortfall", "abs_mean"}))


def test_a_tap_ends_the_pass_only_if_it_may(block):
    module = block()
    for stops in (True, False):
        stats, ended = new_statistics(), True
        with ExitStack() as stack, suppress(Enough):
            Tap(stats, stops=stops).attach(stack, module.child.first, None)
            module(BATCHES[0])
            ended = False
        assert ended == stops
        assert stats.tokens == 10
    module(BATCHES[0])
    assert stats.tokens == 10, "it is gone with its stack"


@pytest.mark.parametrize("biased", [True, False], ids=["with a bias", "without"])
@pytest.mark.parametrize("flat", [False, True], ids=["(B, T, H)", "(T, H)"])
def test_a_tap_asks_for_what_the_stream_lacks_without_the_bias(block, biased, flat):
    module, stats = block(), new_statistics()
    if not biased:
        module.child.last.bias = None
    float_sum = BATCHES[1].reshape(-1, 8) if flat else BATCHES[1]
    seen = []
    module.child.last.register_forward_pre_hook(lambda _module, args: seen.append(args[0].reshape(-1, 8)))
    kept = float_sum.clone()
    with ExitStack() as stack:
        Tap(stats, stops=False, float_sum=float_sum).attach(stack, module.child.last, module.norm)
        module(BATCHES[0])
    wanted = (BATCHES[1] - BATCHES[0]).reshape(-1, 8) - (module.child.last.bias if biased else 0)
    torch.testing.assert_close(stats.finish().wanted_output, wanted.t() @ seen[0] / 10)
    assert stats.drift is None
    assert torch.equal(float_sum, kept)


def recorded(module, folder, closing, batches=BATCHES, limit=1 << 20):
    """A replay that has seen what the child's last layer reads on all batches."""
    replay = Replay(module, lambda name: Spool(folder / name, limit))
    for batch in batches:
        with ExitStack() as stack, suppress(Enough):
            Tap(new_statistics(), stops=True, record=replay.recorder(closing)).attach(stack, module.child.last, None)
            module(batch)
    return replay


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("width", [8, 12], ids=["as wide as the stream", "wider"])
@pytest.mark.parametrize("outputs", [0, 1, 2, 3])
def test_a_replayed_child_gives_what_it_gave_without_running(block, tmp_path, width, outputs, limit):
    module = block(width, outputs)
    expected = [module(batch) for batch in BATCHES]
    returned = module.child(BATCHES[0])
    closing = Closing("child", outputs)
    stats = InputStatistics(width, frozenset())
    replay = Replay(module, lambda name: Spool(tmp_path / name, limit))
    for batch in BATCHES:
        with ExitStack() as stack, suppress(Enough):
            Tap(stats, stops=True, record=replay.recorder(closing)).attach(stack, module.child.last, None)
            module(batch)
    assert stats.tokens == 30
    replay.begin(closing, "child.last")
    calls = module.child.calls
    for _ in range(3):
        for index in (2, 0, 1):
            replay.batch = index
            torch.testing.assert_close(module(BATCHES[index]), expected[index])
    replayed = module.child(BATCHES[0])
    assert type(replayed) is type(returned)
    assert not outputs or (len(replayed) == outputs and replayed[1:] == (None,) * (outputs - 1))
    assert module.child.calls == calls
    replay.end()
    torch.testing.assert_close(module(BATCHES[0]), expected[0])
    assert module.child.calls == calls + 1


def test_a_replay_gives_what_the_last_layer_now_makes_of_its_input(block, tmp_path):
    """The layer is quantized after its inputs were kept and before the first replay."""
    module, closing = block(), Closing("child", 0)
    replay = recorded(module, tmp_path, closing)
    module.child.last.weight.mul_(0.5)
    expected = module(BATCHES[1])
    replay.begin(closing, "child.last")
    replay.batch = 1
    assert torch.equal(module(BATCHES[1]), expected)
    replay.end()


def test_without_a_place_or_a_closing_nothing_is_replayed(block, tmp_path):
    module = block()
    nowhere = Replay(module, None)
    assert nowhere.recorder(Closing("child", 0)) is None
    nowhere.begin(Closing("child", 0), "child.last")
    somewhere = Replay(module, lambda name: Spool(tmp_path / name, 0))
    assert somewhere.recorder(None) is None
    somewhere.begin(None, "child.last")
    assert "forward" not in module.child.__dict__


def test_a_replay_that_ends_gives_the_child_its_own_forward_back(block, tmp_path):
    module, closing = block(), Closing("child", 0)
    replay = recorded(module, tmp_path, closing)
    replay.changed(["child.first"])  # not replayed yet: nothing to forget
    replay.begin(closing, "child.last")
    replay.changed(["norm"])
    assert "forward" in module.child.__dict__, "the norm is no part of the child"
    replay.changed(["norm", "child.first"])
    replay.end()
    assert "forward" not in module.child.__dict__
    calls = module.child.calls
    module(BATCHES[0])
    assert module.child.calls == calls + 1


def test_a_block_may_change_what_it_is_given(block, tmp_path):
    module, closing = block(), Closing("child", 0)
    replay = recorded(module, tmp_path, closing)
    replay.begin(closing, "child.last")
    expected = module.child(BATCHES[0]).clone()
    for _ in range(3):
        output = module.child(BATCHES[0])
        assert torch.equal(output, expected)
        output.add_(1)
    replay.end()
