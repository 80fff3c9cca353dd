"""Rounding that learns: values and gradients against PyTorch's own."""

import pytest
import torch
from qhub_qat.steps import ActivationStep, WeightStep


def values(*shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).requires_grad_()


@pytest.mark.parametrize(("zero", "bits"), [(0, 4), (7, 4), (128, 8)], ids=["after a ReLU", "around zero", "8 bits"])
def test_an_activation_step_has_the_values_and_gradients_of_lsq(zero, bits):
    x, gradient = values(4, 3, 5, 5), values(4, 3, 5, 5, seed=1).detach()
    step = ActivationStep(0.3, zero, bits)
    made = step(x)
    made.backward(gradient)
    low, high = -zero, 2**bits - 1 - zero
    other, scale = x.detach().clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
    factor = (75 * max(high, -low)) ** -0.5
    wanted = torch._fake_quantize_learnable_per_tensor_affine(other, scale, torch.tensor([float(zero)]), 0, 2**bits - 1, factor)
    wanted.backward(gradient)
    assert torch.equal(made, wanted)
    assert torch.equal(x.grad, other.grad)
    torch.testing.assert_close(step.scale.grad, scale.grad[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 20)], ids=["convolution", "linear"])
def test_a_weight_step_has_a_gradient_for_each_output(bits, shape):
    weight, gradient = values(*shape), values(*shape, seed=1).detach()
    step = WeightStep(torch.linspace(0.1, 0.4, 6), bits)
    step(weight).backward(gradient)
    other, scale = weight.detach().clone().requires_grad_(), step.scale.detach().clone().requires_grad_()
    top = 2 ** (bits - 1) - 1
    factor = (weight[0].numel() * top) ** -0.5
    torch._fake_quantize_learnable_per_channel_affine(other, scale, torch.zeros(6), 0, -top, top, factor).backward(gradient)
    assert torch.equal(weight.grad, other.grad)
    torch.testing.assert_close(step.scale.grad, scale.grad)


def test_a_scale_that_a_loop_made_negative_still_rounds_upwards():
    step = WeightStep(torch.tensor([0.5]), 4)
    with torch.no_grad():
        step.scale.neg_()
        assert step(torch.tensor([[0.9, -0.3]])).tolist() == [[1.0, -0.5]]
        step.scale.zero_()
        assert torch.isfinite(step(torch.tensor([[0.9, -0.3]]))).all()
