"""Codes of weights: plain rounding, and rounding that makes up for its own errors."""

import pytest
import torch
from qhub_ptq.feedback import DAMPING, best_weight, round_with_feedback
from qhub_ptq.moments import Moments
from qhub_ptq.weights import real, round_for_inputs, round_weight

from qhub import output_loss


def problem(inputs=96, outputs=12, rows=2000, seed=0):
    """A weight and correlated inputs (rows, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator) @ mixing


def moments_of(x, rounded):
    moments = Moments()
    moments.add_products(x, rounded)
    return moments


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_output_has_a_symmetric_grid_that_uses_no_lowest_code(bits):
    weight, _ = problem()
    found = round_weight(weight, bits)
    assert found.scale.shape == (12, 1)
    assert bool((found.zero == 2 ** (bits - 1)).all())
    assert int(found.codes.min()) >= 1
    assert int(found.codes.max()) <= 2**bits - 1


def test_eight_bits_clip_nothing():
    weight, _ = problem()
    found = round_weight(weight, 8)
    assert float(((found.dequantize() - weight).abs() / found.scale).max()) <= 0.5 + 1e-3


def test_a_reduced_range_leaves_the_large_codes_unused():
    weight, _ = problem()
    codes = round_weight(weight, 8, reduce_range=True).codes.int() - 128
    assert int(codes.abs().max()) <= 64
    assert float((round_weight(weight, 8, reduce_range=True).dequantize() - weight).abs().max()) < 0.05


def test_the_best_weight_is_that_of_least_squares():
    weight, x = problem()
    rounded = (x * 2).round() / 2
    found = best_weight(weight, rounded.t() @ rounded / len(x), x.t() @ rounded / len(x))
    damped = rounded.t() @ rounded / len(x)
    damped += DAMPING * damped.diagonal().mean() * torch.eye(96)
    expected = weight + (weight @ (x - rounded).t() @ rounded / len(x)) @ torch.linalg.inv(damped)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (rounded @ found.t() - x @ weight.t()).norm() < (rounded @ weight.t() - x @ weight.t()).norm()


def column_by_column(weight, tensor, gram):
    """GPTQ as in arXiv 2210.17323, in float64."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    hessian = gram.double()[order][:, order]
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    remaining, codes = weight.double()[:, order].clone(), torch.zeros_like(tensor.codes)
    for column, place in enumerate(order.tolist()):
        code = ((remaining[:, column] / tensor.scale[:, 0]).round() + tensor.zero[:, 0]).clamp(1, 2**tensor.bits - 1)
        codes[:, place] = code.to(torch.uint8)
        error = (remaining[:, column] - (code - tensor.zero[:, 0]) * tensor.scale[:, 0]) / inverse[column, column]
        remaining[:, column:] -= torch.outer(error, inverse[column, column:])
    return codes


@pytest.mark.parametrize("inputs", [9, 64, 150])
def test_feedback_gives_the_codes_of_gptq(inputs):
    weight, x = problem(inputs)
    gram = x.t() @ x / len(x)
    plain = round_weight(weight, 4)
    found = round_with_feedback(weight, plain, gram)
    assert float((found.codes == column_by_column(weight, plain, gram)).float().mean()) > 0.99
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_output_error_is_far_below_that_of_rounding(bits):
    weight, x = problem()
    gram = x.t() @ x / len(x)
    losses = [
        float(output_loss(found.dequantize() - weight, gram).sum())
        for found in (round_for_inputs(weight, bits, moments_of(x[None], x[None])), round_weight(weight, bits))
    ]
    assert losses[0] < 0.7 * losses[1]


def test_groups_of_a_convolution_do_not_mix():
    weight, x = problem(18, 8)
    taps = torch.stack([x[:1000, :9], x[1000:, 9:]])
    moments = moments_of(taps, taps)
    found = round_for_inputs(weight[:, :9].reshape(8, 1, 3, 3), 4, moments)
    for group in range(2):
        part = moments_of(taps[group : group + 1], taps[group : group + 1])
        alone = round_for_inputs(weight[4 * group : 4 * group + 4, :9].reshape(4, 1, 3, 3), 4, part)
        assert torch.equal(found.codes[4 * group : 4 * group + 4], alone.codes)


def test_inputs_that_are_always_zero_are_no_obstacle():
    weight, x = problem()
    x[:, 5:40] = 0
    found = round_for_inputs(weight, 4, moments_of(x[None], x[None]))
    assert bool(torch.isfinite(found.dequantize()).all())
    zeros = torch.zeros_like(x)[None]
    assert round_for_inputs(weight, 4, moments_of(zeros, zeros)).codes.shape == weight.shape


def test_the_real_weight_has_the_shape_of_the_weight():
    weight = torch.randn(4, 2, 3, 3)
    assert real(weight, round_weight(weight, 8)).shape == weight.shape
