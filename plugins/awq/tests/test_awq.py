"""`awq`: scales that never lose to plain rounding on the calibration data, folded into the producers."""

import itertools
import subprocess
import sys

import pytest
import torch
from qhub_awq import search
from qhub_awq.descent import descend
from qhub_awq.plugin import Awq, qhub_quantizers
from safetensors.torch import load_file
from tiny_models import quantize, random_ids, tiny_model

from qhub import QuantizedWeights, Scheme, output_loss, quantize_rtn

IDS = random_ids(8, 32)
SCHEME = Scheme.parse("w4a16-g32-asym")


class Watched(Awq):
    """AWQ that notes, for each group, its objective with plain rounding and with what it chose."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scales_chosen, self.rows_chosen = {}, {}

    def scale_group(self, group, block):
        scale = super().scale_group(group, block)

        def objective(tried):
            scaled = {
                name: search.rounded(weight, tried, block.schemes(group)[name], block.dtype) for name, weight in group.weights.items()
            }
            if len(scaled) > 1:
                return group.output_error(scaled)
            ((name, weight),) = group.weights.items()
            return float(output_loss(scaled[name] - weight, group.stats.gram).mean())

        ones = torch.ones(len(group.stats.abs_mean))
        self.scales_chosen[block.index, "".join(group.weights)] = objective(ones), objective(ones if scale is None else scale)
        return scale

    def quantize_group(self, group, block):
        result = super().quantize_group(group, block)
        for name, weight in group.weights.items():
            plain = quantize_rtn(weight, block.schemes(group)[name], block.dtype)
            pair = (output_loss(tensor.dequantize() - weight, group.stats.gram) for tensor in (plain, result[name]))
            self.rows_chosen[block.index, name] = tuple(pair)
        return result


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "w4a16-g32-asym"), ("gpt2", "w3a16-g16-sym"), ("falcon", "w2a16-g64-asym"), ("gemma2", "w4a16-channel-sym")],
)
def test_it_is_never_worse_than_rtn_on_the_calibration_objective(tmp_path, family, scheme):
    quantizer = Watched(steps=5, compensate=False)  # so that the weight itself is what rows are judged by
    quantize(tiny_model(family), tmp_path, quantizer, scheme, ids=IDS)
    assert quantizer.scales_chosen
    for group, (plain, chosen) in quantizer.scales_chosen.items():
        assert chosen <= plain, group
    assert any(chosen < 0.9 * plain for plain, chosen in quantizer.scales_chosen.values())
    for layer, (plain, chosen) in quantizer.rows_chosen.items():
        assert bool((chosen <= plain * (1 + 1e-5)).all()), layer


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w3a16-g32-asym"])
def test_the_whole_model_is_better_than_with_rtn(tmp_path, scheme):
    from tiny_models import logits_of, quantized_logits

    class Nearest(Awq):
        needs, scales = frozenset(), False

        def quantize_group(self, group, block):
            return {name: quantize_rtn(weight, block.schemes(group)[name], block.dtype) for name, weight in group.weights.items()}

    expected, errors = logits_of(tiny_model("llama"), IDS), []
    for name, quantizer in (("awq", Awq()), ("rtn", Nearest())):
        quantize(tiny_model("llama"), tmp_path / name, quantizer, scheme, ids=IDS if quantizer.needs else None)
        errors.append(float((quantized_logits(tmp_path / name / "model", IDS) - expected).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_scales_are_folded_into_the_producers(tmp_path):
    source = tiny_model("llama", torch.bfloat16)
    result = quantize(source, tmp_path, Awq(), str(SCHEME), ids=IDS)
    assert not result.notes
    before, shard = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model-00002-of-00003.safetensors")
    for name in ("input_layernorm", "post_attention_layernorm"):
        ratio = before[f"model.layers.0.{name}.weight"].float() / shard[f"model.layers.0.{name}.weight"].float()
        assert float(ratio.max() / ratio.min()) > 1.05, "the norm gives what the layers take"
        assert bool((ratio > 0).all())
    written = QuantizedWeights(tmp_path / "model").layer("model.layers.0.self_attn.q_proj").dequantize()
    ratio = before["model.layers.0.input_layernorm.weight"].float() / shard["model.layers.0.input_layernorm.weight"].float()
    original = before["model.layers.0.self_attn.q_proj.weight"].float()
    assert float((written / ratio - original).norm() / original.norm()) < 0.15


def test_without_data_it_rounds_to_nearest_and_folds_nothing(tmp_path):
    quantize(tiny_model("llama"), tmp_path, Awq(), str(SCHEME))
    before = load_file(tiny_model("llama") / "model.safetensors")
    written = QuantizedWeights(tmp_path / "model")
    assert torch.equal(written.read("model.layers.0.input_layernorm.weight"), before["model.layers.0.input_layernorm.weight"])
    for name in written.schemes:
        assert torch.equal(written.layer(name).codes, quantize_rtn(before[f"{name}.weight"], SCHEME, torch.float32).codes)


def random_layer(outliers=True):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 128, generator=generator)
    if outliers:
        inputs[:, ::19] *= 20
    return torch.randn(40, 128, generator=generator), inputs, inputs.t() @ inputs / len(inputs)


def best_of(weight, inputs, gram):
    loss = search.single_layer_loss(weight, gram, SCHEME, torch.float32)
    x, w = inputs.abs().mean(0), search.weight_magnitude({"a": weight}, {"a": SCHEME})
    return loss, search.best_scale(loss, lambda power, duo: search.candidate(x, w, power, duo=duo), 10)


def test_salient_inputs_are_scaled_up():
    weight, inputs, gram = random_layer()
    loss, scale = best_of(weight, inputs, gram)
    assert loss(scale) < 0.7 * loss(torch.ones(128))
    assert float(scale[::19].mean()) > 1.5 * float(scale[1::19].mean())


def test_the_identity_is_kept_when_nothing_beats_it():
    found = search.best_scale(lambda scale: float((scale - 1).abs().sum()), lambda power, duo: torch.full((4,), 1 + power), 5)
    assert found is None


@pytest.mark.parametrize("steps", [1, 3, 5, 10])
@pytest.mark.parametrize("duo", [False, True], ids=["x", "x and w"])
def test_the_best_power_is_found_where_the_loss_has_one_valley(steps, duo):
    """Every second power is tried, then the neighbours of the best."""
    for best in range(1, steps + (not duo)):
        tried = []

        def loss(scale, best=best):
            return abs(float(scale[0]) - best / steps) + (float(scale[1]) != duo)

        def at(power, other, tried=tried):
            tried.append((power, other))
            return torch.tensor([power, float(other)])

        found = search.best_scale(loss, at, steps)
        assert float(found[0]) == pytest.approx(best / steps)
        assert bool(found[1]) == duo
        assert all(0 < power <= 1 for power, _ in tried)


def test_the_loss_of_one_layer_is_its_output_error():
    weight, inputs, gram = random_layer()
    scale = torch.linspace(0.5, 2, 128)
    error = inputs @ (search.rounded(weight, scale, SCHEME, torch.float32) - weight).t()
    assert search.single_layer_loss(weight, gram, SCHEME, torch.float32)(scale) == pytest.approx(float(error.square().mean()), rel=1e-4)


@pytest.mark.parametrize("magnitude", [torch.zeros(16), torch.tensor([0.0, 1e-20, 1e20, 1.0] * 4)], ids=["silent inputs", "extremes"])
def test_candidates_can_always_be_folded(magnitude):
    for power, duo in itertools.product((0.2, 0.6, 1.0), (False, True)):
        scale = search.candidate(magnitude, torch.rand(16), power, duo=duo)
        assert bool(torch.isfinite(scale).all())
        assert 2.0**-10 <= float(scale.min()) <= float(scale.max()) <= 2.0**10


@pytest.mark.parametrize(
    "scheme", [Scheme.parse("w4a16-g32-asym"), Scheme.parse("w2a16-g64-sym"), Scheme.parse("w3a16-channel-asym")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_descending_makes_no_row_worse_and_the_whole_much_better(scheme, dtype):
    weight, _, gram = random_layer()
    start = quantize_rtn(weight, scheme, dtype)
    kept = start.codes.clone(), weight.clone(), gram.clone()
    found = descend(weight, start, gram, scheme, dtype, 2)
    losses = [output_loss(tensor.dequantize() - weight, gram) for tensor in (start, found)]
    assert bool((losses[1] <= losses[0] * (1 + 1e-4)).all())
    assert float(losses[1].sum()) < 0.8 * float(losses[0].sum())
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    assert torch.equal(found.zero, found.zero.round())
    assert 1 <= float(found.zero.min()) <= float(found.zero.max()) <= 2**scheme.weight_bits - 1
    assert int(found.codes.max()) <= 2**scheme.weight_bits - 1
    assert all(torch.equal(*pair) for pair in zip((start.codes, weight, gram), kept, strict=True))


def test_without_sweeps_the_start_is_kept():
    weight, _, gram = random_layer()
    start = quantize_rtn(weight, SCHEME, torch.float16)
    assert torch.equal(descend(weight, start, gram, SCHEME, torch.float16, 0).dequantize(), start.dequantize())


def test_the_hook_offers_it_without_importing_torch():
    assert [quantizer.name for quantizer in qhub_quantizers()] == ["awq"]
    code = "import sys; from qhub_awq.plugin import qhub_quantizers; qhub_quantizers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
