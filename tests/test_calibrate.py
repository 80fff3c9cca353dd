"""Statistics of a layer's input: the same numbers however the tokens come in batches, in float32 and from bf16."""

from __future__ import annotations

import pytest
import torch

from qhub.quantize import calibrate
from qhub.quantize.calibrate import InputStatistics

ALL = frozenset({"gram", "shortfall", "abs_mean"})


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 5, 12, generator=generator) * 2 + 1).to(dtype) for _ in range(3)]


def statistics(needs, pairs):
    found = InputStatistics(12, needs)
    for inputs, float_inputs in pairs:
        found.add(inputs, float_inputs)
    return found.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_means_over_all_tokens(dtype):
    moved = [value + 0.1 * value.roll(1, -1) for value in batches(dtype)]
    found = statistics(ALL, zip(batches(dtype), moved, strict=True))
    tokens = torch.cat([value.reshape(-1, 12) for value in batches(dtype)]).double()
    float_tokens = torch.cat([value.reshape(-1, 12) for value in moved]).double()
    assert found.tokens == 30
    # bf16 sums are rounded once per batch: 2**-9 of what the batch adds
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(found.gram.double(), tokens.t() @ tokens / 30, **bound)
    torch.testing.assert_close(found.drift.double(), (float_tokens - tokens).t() @ tokens / 30, **bound)
    torch.testing.assert_close(found.abs_mean.double(), tokens.abs().mean(0), rtol=1e-5, atol=1e-5)
    assert found.gram.dtype == found.drift.dtype == found.abs_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strip", [1, 5, 12, 100])
def test_second_moments_are_the_same_however_many_rows_are_computed_at_once(monkeypatch, strip, dtype):
    monkeypatch.setattr(calibrate, "_STRIP", strip)
    found = statistics(ALL, [(value, None) for value in batches(dtype)]).gram
    tokens = torch.cat(batches(dtype)).reshape(-1, 12).double()
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), tokens.t() @ tokens / 30, rtol=bound, atol=bound)
    assert torch.equal(found, found.t())


def test_the_wanted_output_is_kept_as_its_product_with_the_inputs():
    wanted = [torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(index)) for index in range(3)]
    kept = [value.clone() for value in wanted]
    found = InputStatistics(12, ALL)
    for values, output in zip(batches(), wanted, strict=True):
        found.add(values, wanted=output)
    tokens, outputs = torch.cat(batches()).reshape(-1, 12), torch.cat(wanted).reshape(-1, 7)
    torch.testing.assert_close(found.finish().wanted_output, outputs.t() @ tokens / 30, rtol=1e-5, atol=1e-5)
    assert found.drift is None
    scale = torch.linspace(0.5, 2, 12)
    found.rescale(scale)
    torch.testing.assert_close(found.wanted_output, outputs.t() @ (tokens / scale) / 30, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(wanted, kept, strict=True))


@pytest.mark.parametrize(
    ("needs", "expected"),
    [({"gram"}, {"gram"}), ({"shortfall"}, {"drift", "wanted_output"}), ({"abs_mean"}, {"abs_mean"}), (set(), set())],
    ids=["gram", "shortfall", "abs_mean", "nothing"],
)
def test_only_what_was_asked_for_is_collected(needs, expected):
    found = InputStatistics(12, frozenset(needs))
    for values in batches():
        found.add(values, values)
        found.add(values, wanted=values)
    found.finish()
    names = ("gram", "drift", "wanted_output", "abs_mean")
    assert {name for name in names if getattr(found, name) is not None} == expected
    assert found.tokens == 60


def test_the_inputs_are_not_modified():
    values = batches()
    statistics(ALL, [(value, value * 2) for value in values])
    assert all(torch.equal(*pair) for pair in zip(values, batches(), strict=True))


def test_no_tokens_are_no_error():
    found = InputStatistics(12, ALL).finish()
    assert (found.tokens, found.gram, found.drift, found.wanted_output, found.abs_mean) == (0, None, None, None, None)
    found.rescale(torch.ones(12))


def test_rescaling_is_the_same_as_dividing_the_inputs():
    scale = torch.rand(12, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
    moved = [value * 1.1 for value in batches()]
    found = statistics(ALL, zip(batches(), moved, strict=True))
    found.rescale(scale)
    expected = statistics(ALL, [(value / scale, other / scale) for value, other in zip(batches(), moved, strict=True)])
    for one, other in ((found.gram, expected.gram), (found.drift, expected.drift), (found.abs_mean, expected.abs_mean)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
