"""Histograms from one pass, and the ranges that are chosen on them."""

import pytest
import torch
from qhub_ptq.histogram import BINS, Histogram, histograms
from qhub_ptq.moments import round_on
from qhub_ptq.ranges import RANGES, entropy, grid_of, minmax, mse, percentile

KINDS = {
    "normal": lambda generator: torch.randn(20000, generator=generator),
    "after a ReLU": lambda generator: torch.randn(20000, generator=generator).relu(),
    "with outliers": lambda generator: torch.cat([torch.randn(20000, generator=generator), torch.tensor([60.0, -45.0])]),
    "lopsided": lambda generator: torch.rand(20000, generator=generator) * 8 - 0.2,
    "mostly zero": lambda generator: torch.randn(20000, generator=generator).sub(2).relu(),
}


@pytest.fixture(params=KINDS, ids=str)
def numbers(request):
    return KINDS[request.param](torch.Generator().manual_seed(0))


def seen(*tensors):
    found = Histogram()
    for tensor in tensors:
        found.add(tensor)
    return found


def squared_error(numbers, ends, bits, *, symmetric=False):
    return float((round_on(grid_of(ends, bits, symmetric=symmetric), numbers) - numbers).double().square().sum())


def test_extremes_are_exact_and_everything_is_counted(numbers):
    found = seen(*numbers.split(3000))
    assert (found.low, found.high) == (min(float(numbers.min()), 0.0), float(numbers.max()))
    assert float(found.counts.sum()) == len(numbers)
    assert found.top >= max(-found.low, found.high)


def test_batches_that_grow_give_the_counts_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(5000, generator=generator) * size for size in (0.1, 1.0, 0.5, 20.0)]
    found = seen(*parts)
    expected = torch.histc(torch.cat(parts), 2 * BINS, -found.top, found.top).double()
    assert float((found.counts.cumsum(0) - expected.cumsum(0)).abs().max()) <= 3  # numbers that lie between two bins
    assert float(found.counts.sum()) == 20000


def test_sizes_count_both_sides():
    found = seen(torch.tensor([-1.0, 1.0, 0.5]))
    sizes = found.of_sizes()
    assert (float(sizes[-1]), float(sizes.sum())) == (2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named_by_its_tensor(bad):
    with pytest.raises(ValueError, match=r"^second$"):
        histograms(iter([iter([("first", torch.ones(3)), ("second", torch.tensor([1.0, bad]))])]))


def test_a_tensor_of_zeros_has_a_grid():
    found = seen(torch.zeros(10))
    for choose in RANGES.values():
        grid = grid_of(choose(found, 8, symmetric=False), 8, symmetric=False)
        assert grid.scale > 0
        assert torch.equal(round_on(grid, torch.zeros(10)), torch.zeros(10))


def test_minmax_clips_nothing(numbers):
    low, high = minmax(seen(numbers), 8, symmetric=False)
    assert low <= float(numbers.min())
    assert high >= float(numbers.max())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_close_to_the_best_of_a_brute_force_search(numbers, bits, symmetric):
    found = seen(numbers)
    chosen = squared_error(numbers, mse(found, bits, symmetric=symmetric), bits, symmetric=symmetric)
    shares = [0.05 * step for step in range(2, 21)]
    tried = [(low * found.low, high * found.high) for low in shares for high in shares]
    best = min(squared_error(numbers, ends, bits, symmetric=symmetric) for ends in tried)
    assert chosen <= 1.1 * best
    assert chosen <= squared_error(numbers, minmax(found, bits, symmetric=symmetric), bits, symmetric=symmetric) * 1.01


def test_percentile_cuts_what_it_says(numbers):
    low, high = percentile(seen(numbers), 8, symmetric=False)
    cut = int(((numbers < low - 1e-6) | (numbers > high + 1e-6)).sum())
    assert cut <= 0.0001 * len(numbers) + 1
    assert low <= 0 <= high


def test_entropy_cuts_outliers_and_keeps_the_rest():
    numbers = KINDS["with outliers"](torch.Generator().manual_seed(0))
    low, high = entropy(seen(numbers), 8, symmetric=False)
    assert 2 < high < 12
    assert -12 < low < -2


def test_zeros_do_not_make_entropy_clip():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.rand(2000, generator=generator), torch.zeros(200000)])
    _, high = entropy(seen(numbers), 8, symmetric=False)
    assert high > 0.8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (0.0, 6.0), (-3.0, 0.0), (0.5, 1.0), (0.0, 0.0)], ids=str)
def test_a_grid_holds_zero_and_what_it_is_asked_to_hold(ends, symmetric, bits):
    grid = grid_of(ends, bits, symmetric=symmetric)
    assert float(round_on(grid, torch.zeros(1))) == 0
    assert 0 <= grid.zero <= 2**bits - 1
    assert grid.low <= min(ends[0], 0) + grid.scale
    assert grid.high >= ends[1] - grid.scale
    assert not symmetric or grid.zero == 2 ** (bits - 1)
