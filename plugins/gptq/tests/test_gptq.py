"""`gptq`: the textbook's codes from a factor instead of an inverse, better than rounding, and fallbacks that are told."""

import subprocess
import sys

import pytest
import torch
from qhub_gptq import solver
from qhub_gptq.plugin import Gptq, qhub_quantizers
from qhub_gptq.solver import Hessian, round_with_feedback
from tiny_models import logits_of, quantize, quantized_logits, random_ids, tiny_model

from qhub import Grid, QTensor, QuantizedWeights, Scheme, compensate, lower_factor, minmax_grid, output_loss, quantize_rtn

IDS = random_ids(8, 32)
SCHEME = Scheme.parse("w4a16-g32-asym")
DAMPING = 0.05


def problem(inputs=256, outputs=24, seed=0, dtype=torch.float64):
    """A weight (outputs, inputs) and the mean of x xᵀ for correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs, dtype=dtype) + torch.randn(inputs, inputs, generator=generator, dtype=dtype) / inputs**0.5
    values = torch.randn(3 * inputs, inputs, generator=generator, dtype=dtype) @ mixing
    values[:, ::23] *= 5
    return torch.randn(outputs, inputs, generator=generator, dtype=dtype), values.t() @ values / len(values)


def grid_of(weight, scheme=SCHEME):
    grid = minmax_grid(weight.float(), scheme, torch.float32)
    return Grid(grid.scale.to(weight), grid.zero.to(weight))


def solved(weight, grid, gram, bits=4, damping=DAMPING):
    """The codes alone."""
    return round_with_feedback(weight, grid, Hessian.of(gram, damping), bits)[0]


def textbook(weight, grid, gram, bits, damping):
    """GPTQ as in arXiv 2210.17323, algorithm 1, one column after the other, without blocks; static groups, activation order."""
    inputs = weight.shape[1]
    order = sorted(range(inputs), key=lambda index: -float(gram[index, index]))
    hessian = gram[order][:, order] + damping * gram.diagonal().mean() * torch.eye(inputs, dtype=gram.dtype)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    remaining, codes = weight[:, order].clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    for column, original in enumerate(order):
        group = original // (inputs // grid.scale.shape[1])
        scale, zero = grid.scale[:, group], grid.zero[:, group]
        code = (torch.round(remaining[:, column] / scale) + zero).clamp(0, 2**bits - 1)
        codes[:, original] = code.to(torch.uint8)
        error = (remaining[:, column] - (code - zero) * scale) / inverse[column, column]
        remaining[:, column:] -= torch.outer(error, inverse[column, column:])
    return codes


def loss_of(codes, weight, grid, gram):
    tensor = QTensor(codes, grid.scale.float(), grid.zero.float(), 4, False)
    return float(output_loss(tensor.dequantize().to(weight) - weight, gram).sum())


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16-channel-asym", "w3a16-g128-sym", "w2a16-g64-asym"])
@pytest.mark.parametrize("columns_at_once", [1, 64, 100, 256])
def test_the_codes_are_those_of_the_textbook(monkeypatch, scheme, columns_at_once):
    monkeypatch.setattr(solver, "_COLUMNS", columns_at_once)
    weight, gram = problem()
    scheme = Scheme.parse(scheme)
    grid = grid_of(weight, scheme)
    codes = solved(weight, grid, gram, scheme.weight_bits)
    assert torch.equal(codes, textbook(weight, grid, gram, scheme.weight_bits, DAMPING))
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()


def test_float32_finds_a_solution_as_good():
    weight, gram = problem()
    grid = grid_of(weight)
    exact = solved(weight, grid, gram)
    found = solved(weight.float(), grid_of(weight.float()), gram.float())
    assert float((exact == found).float().mean()) > 0.95
    assert loss_of(found, weight, grid, gram) == pytest.approx(loss_of(exact, weight, grid, gram), rel=0.02)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w3a16-g64-sym", "w2a16-channel-asym"])
def test_the_output_error_is_far_below_that_of_rounding(scheme):
    weight, gram = problem()
    scheme = Scheme.parse(scheme)
    grid, plain = grid_of(weight, scheme), quantize_rtn(weight.float(), scheme, torch.float32)
    codes = solved(weight, grid, gram, scheme.weight_bits)
    assert loss_of(codes, weight, grid, gram) < 0.6 * loss_of(plain.codes, weight, grid, gram)


def test_activation_order_does_not_survive():
    """With one scale per row, renaming the inputs renames the codes and does nothing else."""
    weight, gram = problem()
    scheme, order = Scheme.parse("w4a16-channel-asym"), torch.randperm(256, generator=torch.Generator().manual_seed(1))
    codes = solved(weight, grid_of(weight, scheme), gram)
    renamed = solved(weight[:, order], grid_of(weight[:, order], scheme), gram[order][:, order])
    assert torch.equal(renamed, codes[:, order])


def test_rows_do_not_depend_on_each_other():
    weight, gram = problem()
    whole = solved(weight, grid_of(weight), gram)
    part = solved(weight[5:9], grid_of(weight[5:9]), gram)
    assert torch.equal(part, whole[5:9])


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, gram = problem()
    grid = grid_of(weight)
    codes = solved(weight, grid, torch.diag(gram.diagonal()))
    expected = quantize_rtn(weight.float(), SCHEME, torch.float32).codes
    assert float((codes == expected).float().mean()) > 0.999


def test_silent_inputs_are_no_obstacle():
    weight, gram = problem()
    gram[7], gram[:, 7] = 0, 0
    gram[100:132], gram[:, 100:132] = 0, 0
    codes = solved(weight, grid_of(weight), gram, 4, 0.0)
    expected = quantize_rtn(weight.float(), SCHEME, torch.float32).codes
    assert torch.equal(codes[:, 100:132], expected[:, 100:132])


def test_a_hessian_that_does_not_factorise_gives_none():
    _, gram = problem()
    assert Hessian.of(gram * torch.nan, DAMPING) is None


def test_the_most_active_input_comes_last_and_the_factor_is_that_of_the_reordered_matrix():
    _, gram = problem()
    hessian = Hessian.of(gram, DAMPING)
    energy = gram.diagonal()[hessian.order]
    assert bool((energy.diff() >= 0).all())
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(256, dtype=gram.dtype)
    torch.testing.assert_close(hessian.factor @ hessian.factor.t(), damped[hessian.order][:, hessian.order])
    assert torch.equal(hessian.factor, hessian.factor.tril())


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w2a16-channel-sym"])
@pytest.mark.parametrize("columns_at_once", [1, 64, 100, 256])
def test_the_loss_of_each_row_is_its_error_under_the_damped_hessian(monkeypatch, scheme, columns_at_once):
    monkeypatch.setattr(solver, "_COLUMNS", columns_at_once)
    weight, gram = problem()
    scheme = Scheme.parse(scheme)
    grid = grid_of(weight, scheme)
    codes, loss = round_with_feedback(weight, grid, Hessian.of(gram, DAMPING), scheme.weight_bits)
    tensor = QTensor(codes, grid.scale.float(), grid.zero.float(), scheme.weight_bits, scheme.symmetric)
    error = tensor.dequantize().double() - weight
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(256, dtype=gram.dtype)
    torch.testing.assert_close(loss, (error @ damped @ error.t()).diagonal(), rtol=1e-5, atol=1e-6)


def test_it_compensates_as_everyone_does_whatever_the_order():
    weight, gram = problem()
    shortfall = torch.randn(24, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = Hessian.of(gram, DAMPING).compensate(weight, shortfall)
    torch.testing.assert_close(found, compensate(weight, shortfall, lower_factor(gram, DAMPING)))


def test_nothing_is_modified():
    weight, gram = problem()
    grid, shortfall = grid_of(weight), weight.clone()
    parts = (weight, gram, grid.scale, grid.zero, shortfall)
    kept = [part.clone() for part in parts]
    hessian = Hessian.of(gram, DAMPING)
    held = hessian.order.clone(), hessian.factor.clone()
    hessian.compensate(weight, shortfall)
    round_with_feedback(weight, grid, hessian, 4)
    assert all(torch.equal(*pair) for pair in zip(parts, kept, strict=True))
    assert torch.equal(hessian.order, held[0])
    assert torch.equal(hessian.factor, held[1])


# In the walk


@pytest.mark.parametrize(("family", "bound"), [("llama", 0.5), ("gpt2", 0.9), ("falcon", 0.9), ("gemma2", 0.9)])
def test_the_whole_model_is_better_than_with_rounding(tmp_path, family, bound):
    class Nearest(Gptq):
        needs = frozenset()

        def quantize_group(self, group, block):
            return {name: quantize_rtn(weight, block.schemes(group)[name], block.dtype) for name, weight in group.weights.items()}

    expected, errors = logits_of(tiny_model(family), IDS), []
    for name, quantizer in (("gptq", Gptq()), ("rtn", Nearest())):
        result = quantize(tiny_model(family), tmp_path / name, quantizer, "w3a16-g32-asym", ids=IDS if quantizer.needs else None)
        errors.append(float((quantized_logits(tmp_path / name / "model", IDS) - expected).square().mean()))
        assert not result.notes
    assert errors[0] < bound * errors[1]


FALLBACKS = {
    "no data": (Gptq(), None, "rounded to nearest: no calibration statistics"),
    "a damping that is never reached": (Gptq(damping=5.0), IDS, "rounded to nearest: the Hessian does not factorise"),
}


@pytest.mark.parametrize(("quantizer", "ids", "note"), FALLBACKS.values(), ids=FALLBACKS)
def test_a_fallback_rounds_to_nearest_and_is_told(tmp_path, quantizer, ids, note):
    from safetensors.torch import load_file

    result = quantize(tiny_model("llama"), tmp_path, quantizer, str(SCHEME), ids=ids)
    assert result.notes == dict.fromkeys(result.schemes, note)
    original, written = load_file(tiny_model("llama") / "model.safetensors"), QuantizedWeights(tmp_path / "model")
    for name in result.schemes:
        assert torch.equal(written.layer(name).codes, quantize_rtn(original[f"{name}.weight"], SCHEME, torch.float32).codes)


def test_layers_that_share_an_input_may_have_different_schemes(tmp_path):
    """Each is what it would be alone: q in the first group of the first block does not depend on k's scheme."""
    layers = []
    for name, overrides in (("one", {}), ("two", {"k_proj": "w4a16-g16-asym", "v_proj": "float"})):
        quantize(tiny_model("llama"), tmp_path / name, Gptq(), str(SCHEME), ids=IDS, overrides=overrides)
        layers.append(QuantizedWeights(tmp_path / name / "model").layer("model.layers.0.self_attn.q_proj"))
    assert torch.equal(layers[0].codes, layers[1].codes)
    assert torch.equal(layers[0].scale, layers[1].scale)


def test_the_hook_offers_it_without_importing_torch():
    assert [quantizer.name for quantizer in qhub_quantizers()] == ["gptq"]
    code = "import sys; from qhub_gptq.plugin import qhub_quantizers; qhub_quantizers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
