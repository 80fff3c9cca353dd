"""Statistics of a layer's input: the same numbers however the tokens come in batches, in float32 and from bf16."""

from __future__ import annotations

import pytest
import torch

from qhub.quantize.calibrate import InputStatistics

BOTH = frozenset({"gram", "drift"})


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 5, 12, generator=generator) * 2 + 1).to(dtype) for _ in range(3)]


def statistics(wanted, pairs):
    found = InputStatistics(12, wanted)
    for inputs, float_inputs in pairs:
        found.add(inputs, float_inputs)
    return found.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_means_over_all_tokens(dtype):
    moved = [value + 0.1 * value.roll(1, -1) for value in batches(dtype)]
    found = statistics(BOTH, zip(batches(dtype), moved, strict=True))
    tokens = torch.cat([value.reshape(-1, 12) for value in batches(dtype)]).double()
    float_tokens = torch.cat([value.reshape(-1, 12) for value in moved]).double()
    assert found.tokens == 30
    # bf16 sums are rounded once per batch: 2**-9 of what the batch adds
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(found.gram.double(), tokens.t() @ tokens / 30, **bound)
    torch.testing.assert_close(found.drift.double(), (float_tokens - tokens).t() @ tokens / 30, **bound)
    torch.testing.assert_close(found.abs_mean.double(), tokens.abs().mean(0), rtol=1e-5, atol=1e-5)
    assert found.gram.dtype == found.drift.dtype == found.abs_mean.dtype == torch.float32


def test_the_residual_is_what_the_stream_has_lost_against_each_input():
    missed = [torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(index)) for index in range(3)]
    found = InputStatistics(12, BOTH)
    for values, behind in zip(batches(), missed, strict=True):
        found.add(values, values, behind)
    tokens, lost = torch.cat(batches()).reshape(-1, 12), torch.cat(missed).reshape(-1, 7)
    torch.testing.assert_close(found.finish().residual, lost.t() @ tokens / 30, rtol=1e-5, atol=1e-5)
    scale = torch.linspace(0.5, 2, 12)
    found.rescale(scale)
    torch.testing.assert_close(found.residual, lost.t() @ (tokens / scale) / 30, rtol=1e-5, atol=1e-5)


def test_only_what_was_asked_for_is_collected():
    found = statistics(frozenset({"gram"}), [(value, value) for value in batches()])
    assert (found.drift, found.residual) == (None, None)
    assert statistics(frozenset(), [(value, value) for value in batches()]).gram is None


def test_the_inputs_are_not_modified():
    values = batches()
    statistics(BOTH, [(value, value * 2) for value in values])
    assert all(torch.equal(*pair) for pair in zip(values, batches(), strict=True))


def test_no_tokens_are_no_error():
    found = InputStatistics(12, BOTH).finish()
    assert (found.tokens, found.gram, found.drift) == (0, None, None)
    assert torch.equal(found.abs_mean, torch.zeros(12))


def test_rescaling_is_the_same_as_dividing_the_inputs():
    scale = torch.rand(12, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
    moved = [value * 1.1 for value in batches()]
    found = statistics(BOTH, zip(batches(), moved, strict=True))
    found.rescale(scale)
    expected = statistics(BOTH, [(value / scale, other / scale) for value, other in zip(batches(), moved, strict=True)])
    for one, other in ((found.gram, expected.gram), (found.drift, expected.drift), (found.abs_mean, expected.abs_mean)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
