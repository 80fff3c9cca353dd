"""Grids: min-max clips nothing, searching is never worse, and what comes out is what every format holds."""

from __future__ import annotations

import pytest
import torch

from qhub.errors import Unsupported
from qhub.quantize import grid as grids
from qhub.quantize.grid import better_rows, fit_scales, minmax_grid, on_grid, pick_rows, quantize_rtn, search_grid
from qhub.quantize.linalg import output_loss
from qhub.quantize.qtensor import QTensor, dequantize
from qhub.types import Scheme

BITS = range(2, 9)
LAYOUTS = ["g16-sym", "g16-asym", "g32-asym", "g64-sym", "g128-asym", "channel-sym", "channel-asym"]
SCHEMES = pytest.mark.parametrize("scheme", [Scheme.parse(f"w{bits}a16-{layout}") for bits in BITS for layout in LAYOUTS], ids=str)


def weights(rows=24, inputs=256, seed=0):
    """A matrix with ordinary groups, and rows with what trips a grid: outliers, one sign, zeros, constants, tiny, huge."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    weight[:, ::37] *= 8
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] = 0
    weight[4] = 0.7
    weight[5] = -0.7
    weight[6] *= 1e-9
    weight[7] *= 1e3
    weight[8] = weight[8].abs()
    weight[8, ::16] = -1e-3  # almost no negative weights: the zero that would fit is below 1
    weight[9] = torch.where(torch.arange(inputs) % 16 == 0, 5.0, -1e-3)
    return weight


def error_of(weight, tensor, importance):
    groups = (*tensor.scale.shape, -1)
    return ((tensor.dequantize() - weight).square() * importance).reshape(groups).sum(-1)


def check_is_storable(tensor, scheme, dtype):
    assert torch.equal(tensor.scale.half().float(), tensor.scale)
    assert torch.equal(tensor.scale.to(dtype).float(), tensor.scale)
    assert float(tensor.scale.min()) > 0
    assert torch.equal(tensor.zero, tensor.zero.round())
    assert float(tensor.zero.min()) >= 1
    assert float(tensor.zero.max()) <= 2**scheme.weight_bits - 1
    assert int(tensor.codes.max()) <= 2**scheme.weight_bits - 1
    if scheme.symmetric:
        assert bool((tensor.zero == 2 ** (scheme.weight_bits - 1)).all())


@SCHEMES
def test_minmax_clips_nothing(scheme):
    weight = weights()
    tensor = quantize_rtn(weight, scheme, torch.float16)
    check_is_storable(tensor, scheme, torch.float16)
    groups = (*tensor.scale.shape, -1)
    distance = (tensor.dequantize() - weight).abs().reshape(groups)
    assert bool((distance <= tensor.scale.unsqueeze(-1) * 0.5001).all()), "no weight is further away than half a step"


@SCHEMES
def test_minmax_is_no_wider_than_the_weights_need(scheme):
    """Otherwise every weight would pay for it; a zero of at least 1 costs half a code where few weights are negative."""
    weight = weights()[10:]
    grid = minmax_grid(weight, scheme, torch.float32)
    grouped = weight.reshape(*grid.scale.shape, -1)
    top = 2**scheme.weight_bits - 1
    high = grouped.amax(-1)
    needed = (
        2 * grouped.abs().amax(-1) / (top - 1)
        if scheme.symmetric
        else torch.maximum(high - grouped.amin(-1), high * top / (top - 0.5)) / top
    )
    assert bool((grid.scale <= needed * (1 + 2**-10)).all())


@SCHEMES
def test_searching_is_never_worse_than_minmax_in_its_measure(scheme):
    weight = weights()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4 * 100
    searched = on_grid(weight, search_grid(weight, scheme, torch.bfloat16, importance), scheme)
    plain = quantize_rtn(weight, scheme, torch.bfloat16)
    check_is_storable(searched, scheme, torch.bfloat16)
    one, other = error_of(weight, searched, importance), error_of(weight, plain, importance)
    assert bool((one <= other * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("scheme", [Scheme.parse("w3a16-g64-asym"), Scheme.parse("w4a16-g128-sym")], ids=str)
def test_searching_pays_where_outliers_are_unimportant(scheme):
    weight = weights()[10:]
    importance = torch.ones(256)
    importance[::37] = 1e-3
    searched = on_grid(weight, search_grid(weight, scheme, torch.float16, importance), scheme)
    plain = quantize_rtn(weight, scheme, torch.float16)
    assert error_of(weight, searched, importance).sum() < 0.6 * error_of(weight, plain, importance).sum()


def test_more_bits_and_smaller_groups_are_better():
    weight = weights()[10:]
    errors = [
        float((quantize_rtn(weight, Scheme.parse(text), torch.float16).dequantize() - weight).square().sum())
        for text in ("w2-channel-asym", "w3-channel-asym", "w4-channel-asym", "w4-g128-asym", "w4-g32-asym", "w8-g16-asym")
    ]
    assert errors == sorted(errors, reverse=True)


def test_importance_of_nothing_gives_the_plain_grid():
    weight, scheme = weights(), Scheme.parse("w4-g64-asym")
    found, plain = search_grid(weight, scheme, torch.float16, torch.zeros(256)), minmax_grid(weight, scheme, torch.float16)
    assert torch.equal(found.scale, plain.scale)
    assert torch.equal(found.zero, plain.zero)


def test_quantizing_leaves_the_weight_alone():
    weight = weights()
    kept = weight.clone()
    search_grid(weight, Scheme.parse("w4-g64-asym"), torch.float16, torch.ones(256))
    quantize_rtn(weight, Scheme.parse("w4-g64-sym"), torch.float16)
    assert torch.equal(weight, kept)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(Unsupported, match="group size `128` does not divide the layer's `192` inputs"):
        minmax_grid(torch.zeros(2, 192), Scheme.parse("w4-g128-sym"), torch.float16)


def correlated(inputs=256, seed=3):
    values = torch.randn(600, inputs, generator=torch.Generator().manual_seed(seed))
    values = values + 2 * values.roll(1, 1)
    values[:, ::37] *= 6
    return values.t() @ values / 600


@pytest.mark.parametrize(
    "scheme", [Scheme.parse(f"w{bits}-{layout}") for bits in (2, 4) for layout in ("g32-asym", "channel-sym")], ids=str
)
def test_fitted_scales_have_the_least_output_error_for_their_codes(scheme):
    weight, gram = weights()[10:], correlated()
    plain = quantize_rtn(weight, scheme, torch.float16)
    fitted = fit_scales(weight, plain, gram, torch.float16)
    check_is_storable(QTensor(plain.codes, fitted.scale, fitted.zero, plain.bits, plain.symmetric), scheme, torch.float16)
    assert torch.equal(fitted.zero, plain.zero)

    def loss(scale):
        return output_loss(dequantize(plain.codes, scale, plain.zero) - weight, gram)

    assert bool((loss(fitted.scale) <= loss(plain.scale)).all())
    assert float(loss(fitted.scale).sum()) < 0.99 * float(loss(plain.scale).sum())
    for factor in (0.98, 1.02):
        assert bool((loss(fitted.scale * factor) > loss(fitted.scale)).all()), "scales nearby are worse"


def test_a_scale_that_would_move_far_stays():
    """Codes that have nothing to do with the weights, or weights that are zero."""
    weight, scheme, gram = weights(), Scheme.parse("w4-g32-asym"), correlated()
    tensor = quantize_rtn(-weight, scheme, torch.float16)
    fitted = fit_scales(weight, tensor, gram, torch.float16)
    assert bool((fitted.scale <= 2.001 * tensor.scale).all())
    assert bool((fitted.scale >= 0.5 * tensor.scale).all())
    assert torch.equal(fitted.scale[3], tensor.scale[3])


def test_the_better_of_two_is_chosen_row_by_row():
    weight, gram = weights()[10:], correlated()
    one, other = (quantize_rtn(weight, Scheme.parse(text), torch.float16) for text in ("w4-g64-asym", "w4-g64-asym"))
    worse = torch.arange(len(weight)) % 2 == 0
    one = QTensor(torch.where(worse.unsqueeze(1), 15 - one.codes, one.codes), one.scale, one.zero, 4, False)
    other = QTensor(torch.where(worse.unsqueeze(1), other.codes, 15 - other.codes), other.scale * 1.5, other.zero, 4, False)
    best = better_rows(weight, gram, one, other)
    chosen = torch.where((output_loss(other.dequantize() - weight, gram) < output_loss(one.dequantize() - weight, gram)).unsqueeze(1), 1, 0)
    assert 0 < int(chosen.sum()) < len(weight)
    assert torch.equal(best.dequantize(), torch.where(chosen == 1, other.dequantize(), one.dequantize()))
    assert (best.bits, best.symmetric) == (4, False)


def test_rows_are_picked_one_by_one():
    weight = weights()[10:]
    one, other = (quantize_rtn(weight, Scheme.parse(text), torch.float16) for text in ("w4-g64-asym", "w4-g64-sym"))
    take = torch.arange(len(weight)) % 3 == 0
    picked = pick_rows(one, other, take)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(picked, name)[take], getattr(other, name)[take])
        assert torch.equal(getattr(picked, name)[~take], getattr(one, name)[~take])
    assert (picked.bits, picked.symmetric) == (4, False)


@pytest.mark.parametrize("rows", [1, 5, 23])
@pytest.mark.parametrize("scheme", [Scheme.parse("w4-g32-asym"), Scheme.parse("w2-g64-sym"), Scheme.parse("w3-channel-asym")], ids=str)
def test_a_grid_does_not_depend_on_how_many_rows_are_searched_at_once(monkeypatch, scheme, rows):
    weight, importance = weights(), torch.rand(256, generator=torch.Generator().manual_seed(1))
    whole = search_grid(weight, scheme, torch.float16, importance)
    monkeypatch.setattr(grids, "_SEARCHED_AT_ONCE", rows * 256 + 100)
    parts = search_grid(weight, scheme, torch.float16, importance)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.zero, whole.zero)


def test_one_row_is_searched_at_once_however_long_it_is(monkeypatch):
    weight, scheme = weights(), Scheme.parse("w4-g32-asym")
    whole = search_grid(weight, scheme, torch.float16, torch.ones(256))
    monkeypatch.setattr(grids, "_SEARCHED_AT_ONCE", 10)
    assert torch.equal(search_grid(weight, scheme, torch.float16, torch.ones(256)).scale, whole.scale)


@pytest.mark.parametrize("rows", [1, 5, 13])
@pytest.mark.parametrize("scheme", [Scheme.parse("w4-g32-asym"), Scheme.parse("w2-channel-sym")], ids=str)
def test_fitted_scales_do_not_depend_on_how_many_rows_are_fitted_at_once(monkeypatch, scheme, rows):
    weight, gram = weights()[10:], correlated()
    plain = quantize_rtn(weight, scheme, torch.float32)
    whole = fit_scales(weight, plain, gram, torch.float32)
    monkeypatch.setattr(grids, "_FITTED_ROWS", rows)
    parts = fit_scales(weight, plain, gram, torch.float32)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-3, atol=0)  # one step of the half precision that scales are rounded to
    assert torch.equal(parts.zero, whole.zero)


def test_rounding_a_tall_weight_gives_the_rows_that_each_part_gives_alone():
    weight = torch.randn(1500, 512, generator=torch.Generator().manual_seed(5))  # more than is rounded at once
    scheme = Scheme.parse("w4a16-g128-asym")
    whole = quantize_rtn(weight, scheme, torch.bfloat16)
    last = quantize_rtn(weight[-7:], scheme, torch.bfloat16)
    assert whole.codes.shape == weight.shape
    assert torch.equal(whole.codes[-7:], last.codes)
    assert torch.equal(whole.scale[-7:], last.scale)
    assert torch.equal(whole.zero[-7:], last.zero)
