"""Factors, solutions and compensation against torch's own, in float64 where the maths is shown and float32 where it is used."""

from __future__ import annotations

import pytest
import torch

from qhub.quantize import linalg
from qhub.quantize.linalg import compensate, lower_factor, output_loss, product, solve, turned

SIZES = pytest.mark.parametrize("size", [1, 5, 64, 130], ids=lambda size: f"K={size}")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that matrices of a test's size are factored in several blocks, as large ones are."""
    monkeypatch.setattr(linalg, "_BLOCK", 48)


def inputs(tokens, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=dtype) / size**0.5
    return torch.randn(tokens, size, generator=generator, dtype=dtype) @ (mixing + torch.eye(size, dtype=dtype))


def gram_of(values):
    return values.t() @ values / len(values)


def random(*shape, seed=7, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


#: how a (30, 20) and a (20, 40) operand may lie in memory
LAYOUTS = {
    "contiguous": lambda rows, columns, dtype: random(rows, columns, dtype=dtype),
    "transposed": lambda rows, columns, dtype: random(columns, rows, dtype=dtype).t(),
    "some columns": lambda rows, columns, dtype: random(rows, columns + 5, dtype=dtype)[:, 3 : columns + 3],
    "some rows": lambda rows, columns, dtype: random(rows + 5, columns, dtype=dtype)[2 : rows + 2],
    "some rows, transposed": lambda rows, columns, dtype: random(columns, rows + 5, dtype=dtype)[:, 2 : rows + 2].t(),
    "every other row": lambda rows, columns, dtype: random(2 * rows, columns, dtype=dtype)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("right", LAYOUTS.values(), ids=[f"times {name}" for name in LAYOUTS])
@pytest.mark.parametrize("left", LAYOUTS.values(), ids=LAYOUTS)
def test_a_product_is_torchs_however_its_operands_lie_in_memory(monkeypatch, left, right, dtype):
    monkeypatch.setattr(linalg, "_SMALL", 0)
    one, other = left(30, 20, dtype), right(20, 40, dtype)
    kept = one.clone(), other.clone()
    found = product(one, other)
    assert found.dtype == dtype
    torch.testing.assert_close(found, one @ other)
    assert torch.equal(one, kept[0])
    assert torch.equal(other, kept[1])


@pytest.mark.parametrize("shape", [(1, 20, 40), (30, 1, 40), (30, 20, 1), (1, 1, 1)], ids=str)
def test_a_product_of_a_single_row_or_column_is_torchs_too(monkeypatch, shape):
    monkeypatch.setattr(linalg, "_SMALL", 0)
    one, other = random(*shape[:2]), random(*shape[1:], seed=8)
    torch.testing.assert_close(product(one, other), one @ other)


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", 0)
    monkeypatch.setattr(linalg, "_has_onednn", lambda: False)
    one, other = random(30, 20), random(20, 40, seed=8)
    assert torch.equal(product(one, other), one @ other)


def test_turning_transposes_and_takes_the_rows_in_order():
    matrix, order = random(4, 6), torch.tensor([5, 0, 3, 1, 2, 4])
    assert torch.equal(turned(matrix, order), matrix[:, order].t())
    square = random(6, 6)
    assert torch.equal(turned(turned(square, order), order), square[order][:, order])


@SIZES
def test_lower_factor_is_torchs_cholesky(size):
    gram = gram_of(inputs(4 * size, size))
    factor = lower_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.t(), damped)
    torch.testing.assert_close(factor, torch.linalg.cholesky(damped))


@SIZES
def test_lower_factor_takes_inputs_in_any_order(size):
    gram = gram_of(inputs(4 * size, size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lower_factor(gram, 0.05, order), lower_factor(gram[order][:, order], 0.05))


def test_lower_factor_is_the_inverse_of_the_factor_that_gptq_uses():
    """GPTQ takes the upper factor of H⁻¹; with the inputs in reverse, L is that factor's inverse turned by 180°."""
    gram = gram_of(inputs(300, 70))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(70, dtype=torch.float64)
    theirs = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ours = lower_factor(gram, 0.01, torch.arange(70).flip(0)).flip(0, 1)
    torch.testing.assert_close(torch.linalg.inv(ours), theirs)


@pytest.mark.parametrize("order", [None, torch.arange(20).flip(0)], ids=["as they are", "reordered"])
def test_lower_factor_leaves_its_argument_alone(order):
    gram = gram_of(inputs(100, 20))
    kept = gram.clone()
    lower_factor(gram, order=order)
    assert torch.equal(gram, kept)


def test_float32_is_accurate_enough():
    gram = gram_of(inputs(2000, 130))
    exact, found = lower_factor(gram), lower_factor(gram.float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_singular_matrix_factorises_with_damping():
    gram = gram_of(inputs(10, 40)).float()  # rank 10
    factor = lower_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor @ factor.t(), damped, rtol=1e-4, atol=1e-4)


def test_damping_grows_until_the_matrix_factorises():
    """Rounding can leave a matrix with an eigenvalue below zero; here one of −0.1 times the mean of the diagonal."""
    gram = gram_of(inputs(400, 60))
    gram /= gram.diagonal().mean()
    values, vectors = torch.linalg.eigh(gram)
    gram -= (values[0] + 0.1) * torch.outer(vectors[:, 0], vectors[:, 0])
    mean = gram.diagonal().mean()
    factor = lower_factor(gram, 0.01)
    grown = ((factor @ factor.t() - gram).diagonal() / mean).mean()
    assert float(grown) == pytest.approx(0.27), "0.01, 0.03 and 0.09 are too little"


HOPELESS = {
    "a NaN": torch.eye(3).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(torch.nan)),
    "an infinite number": torch.eye(3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf)),
    "a NaN off the diagonal": torch.eye(3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan)),
    "nothing but zeros": torch.zeros(3, 3),
    "far from positive": torch.tensor([[1.0, -9.0], [-9.0, 1.0]]),
}


@pytest.mark.parametrize("gram", HOPELESS.values(), ids=HOPELESS)
def test_a_hopeless_matrix_gives_none(gram):
    both = gram.clone()
    if bool(both.isnan().any()):
        both = torch.where(both.t().isnan(), both.t(), both)
    assert lower_factor(both) is None


def test_inputs_that_were_never_active_do_not_disturb_the_others():
    values = inputs(200, 30)
    alive = torch.ones(30, dtype=torch.bool)
    alive[[3, 17]] = False
    values[:, ~alive] = 0
    factor = lower_factor(gram_of(values), 0.0)
    found = factor @ factor.t()
    torch.testing.assert_close(found[alive][:, alive], gram_of(values)[alive][:, alive])
    assert bool((found[~alive][:, alive] == 0).all())
    assert bool((found[~alive][:, ~alive].diagonal() > 0).all())


@SIZES
@pytest.mark.parametrize("columns", [1, 7])
def test_solve_solves(size, columns):
    gram = gram_of(inputs(4 * size, size))
    factor = lower_factor(gram)
    right = random(size, columns, dtype=torch.float64)
    kept = right.clone()
    solution = solve(factor, right)
    torch.testing.assert_close(factor @ factor.t() @ solution, right)
    torch.testing.assert_close(solution, torch.linalg.solve(factor @ factor.t(), right))
    assert torch.equal(right, kept)


def test_solve_takes_a_right_side_that_is_transposed():
    factor = lower_factor(gram_of(inputs(500, 130)))
    right = random(9, 130, dtype=torch.float64)
    torch.testing.assert_close(solve(factor, right.t()), solve(factor, right.t().contiguous()))


def test_compensation_is_the_least_squares_solution():
    """Without damping, W′ minimises ‖X W′ᵀ − X_float Wᵀ‖ over the calibration tokens."""
    float_inputs = inputs(500, 60)
    quantized_inputs = float_inputs + 0.1 * inputs(500, 60, seed=2)
    weight = torch.randn(9, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drift = (float_inputs - quantized_inputs).t() @ quantized_inputs / 500
    found = compensate(weight, weight @ drift, lower_factor(gram_of(quantized_inputs), 0.0))
    expected = torch.linalg.lstsq(quantized_inputs, float_inputs @ weight.t()).solution.t()
    torch.testing.assert_close(found, expected)

    def error(candidate):
        return float((quantized_inputs @ candidate.t() - float_inputs @ weight.t()).square().sum())

    assert error(found) < 0.9 * error(weight)


def test_it_also_makes_up_for_what_the_stream_has_lost():
    """W′ minimises ‖X W′ᵀ + R − (X_float Wᵀ + R_float)‖ for the stream R that the layer's output is added to."""
    float_inputs = inputs(500, 60)
    quantized_inputs = float_inputs + 0.1 * inputs(500, 60, seed=2)
    missed = 0.3 * quantized_inputs[:, :9] + 0.1 * inputs(500, 9, seed=5)
    weight = torch.randn(9, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = float_inputs @ weight.t() + missed
    gram = gram_of(quantized_inputs)
    shortfall = wanted.t() @ quantized_inputs / 500 - weight @ gram
    kept = weight.clone(), shortfall.clone()
    found = compensate(weight, shortfall, lower_factor(gram, 0.0))
    torch.testing.assert_close(found, torch.linalg.lstsq(quantized_inputs, wanted).solution.t())
    assert torch.equal(weight, kept[0])
    assert torch.equal(shortfall, kept[1])


def test_without_a_shortfall_there_is_nothing_to_compensate():
    weight = torch.randn(4, 20)
    gram = gram_of(inputs(100, 20)).float()
    assert torch.equal(compensate(weight, torch.zeros(4, 20), lower_factor(gram)), weight)


def test_output_loss_is_the_mean_squared_output_error_of_each_row():
    values = inputs(200, 24)
    delta = torch.randn(5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = (values @ delta.t()).square().mean(0)
    torch.testing.assert_close(output_loss(delta, gram_of(values)), expected)
