"""Factors, solutions and compensation against torch's own, in float64 where the maths is shown and float32 where it is used."""

from __future__ import annotations

import pytest
import torch

from qhub.quantize import linalg
from qhub.quantize.linalg import compensate, output_loss, solve_right, upper_factor

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


@SIZES
def test_upper_factor_is_torchs_cholesky_from_the_other_end(size):
    gram = gram_of(inputs(4 * size, size))
    factor = upper_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.t(), damped)
    torch.testing.assert_close(factor, torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1))


def test_upper_factor_is_the_inverse_of_the_factor_that_gptq_uses():
    gram = gram_of(inputs(300, 70))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(70, dtype=torch.float64)
    theirs = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(torch.linalg.inv(upper_factor(gram, 0.01)), theirs)


def test_upper_factor_leaves_its_argument_alone():
    gram = gram_of(inputs(100, 20))
    kept = gram.clone()
    upper_factor(gram)
    assert torch.equal(gram, kept)


def test_float32_is_accurate_enough():
    gram = gram_of(inputs(2000, 130))
    exact, found = upper_factor(gram), upper_factor(gram.float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_singular_matrix_factorises_with_damping():
    gram = gram_of(inputs(10, 40)).float()  # rank 10
    factor = upper_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor @ factor.t(), damped, rtol=1e-4, atol=1e-4)


def test_damping_grows_until_the_matrix_factorises():
    """Rounding can leave a matrix with an eigenvalue below zero; here one of −0.1 times the mean of the diagonal."""
    gram = gram_of(inputs(400, 60))
    gram /= gram.diagonal().mean()
    values, vectors = torch.linalg.eigh(gram)
    gram -= (values[0] + 0.1) * torch.outer(vectors[:, 0], vectors[:, 0])
    mean = gram.diagonal().mean()
    factor = upper_factor(gram, 0.01)
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
    assert upper_factor(both) is None


def test_inputs_that_were_never_active_do_not_disturb_the_others():
    values = inputs(200, 30)
    alive = torch.ones(30, dtype=torch.bool)
    alive[[3, 17]] = False
    values[:, ~alive] = 0
    factor = upper_factor(gram_of(values), 0.0)
    product = factor @ factor.t()
    torch.testing.assert_close(product[alive][:, alive], gram_of(values)[alive][:, alive])
    assert bool((product[~alive][:, alive] == 0).all())
    assert bool((product[~alive][:, ~alive].diagonal() > 0).all())


@SIZES
@pytest.mark.parametrize("rows", [1, 7])
def test_solve_right_solves(size, rows):
    gram = gram_of(inputs(4 * size, size))
    factor = upper_factor(gram)
    right = torch.randn(rows, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = right.clone()
    solution = solve_right(right, factor)
    torch.testing.assert_close(solution @ (factor @ factor.t()), right)
    torch.testing.assert_close(solution, torch.linalg.solve(factor @ factor.t(), right.t()).t())
    assert torch.equal(right, kept)


def test_compensation_is_the_least_squares_solution():
    """Without damping, W′ minimises ‖X W′ᵀ − X_float Wᵀ‖ over the calibration tokens."""
    float_inputs = inputs(500, 60)
    quantized_inputs = float_inputs + 0.1 * inputs(500, 60, seed=2)
    weight = torch.randn(9, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drift = (float_inputs - quantized_inputs).t() @ quantized_inputs / 500
    found = compensate(weight, drift, upper_factor(gram_of(quantized_inputs), 0.0))
    expected = torch.linalg.lstsq(quantized_inputs, float_inputs @ weight.t()).solution.t()
    torch.testing.assert_close(found, expected)

    def error(candidate):
        return float((quantized_inputs @ candidate.t() - float_inputs @ weight.t()).square().sum())

    assert error(found) < 0.9 * error(weight)


def test_with_the_residual_it_also_makes_up_for_what_the_stream_has_lost():
    """W′ minimises ‖X W′ᵀ + R − (X_float Wᵀ + R_float)‖ for the stream R that the layer's output is added to."""
    float_inputs = inputs(500, 60)
    quantized_inputs = float_inputs + 0.1 * inputs(500, 60, seed=2)
    missed = 0.3 * quantized_inputs[:, :9] + 0.1 * inputs(500, 9, seed=5)
    weight = torch.randn(9, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drift, residual = (float_inputs - quantized_inputs).t() @ quantized_inputs / 500, missed.t() @ quantized_inputs / 500
    kept = residual.clone()
    found = compensate(weight, drift, upper_factor(gram_of(quantized_inputs), 0.0), residual)
    expected = torch.linalg.lstsq(quantized_inputs, float_inputs @ weight.t() + missed).solution.t()
    torch.testing.assert_close(found, expected)
    assert torch.equal(residual, kept)


def test_without_drift_there_is_nothing_to_compensate():
    weight = torch.randn(4, 20)
    gram = gram_of(inputs(100, 20)).float()
    assert torch.equal(compensate(weight, torch.zeros(20, 20), upper_factor(gram)), weight)


def test_output_loss_is_the_mean_squared_output_error_of_each_row():
    values = inputs(200, 24)
    delta = torch.randn(5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = (values @ delta.t()).square().mean(0)
    torch.testing.assert_close(output_loss(delta, gram_of(values)), expected)
