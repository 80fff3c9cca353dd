"""`rtn`: the plain grid or the searched one, without data."""

import subprocess
import sys

import pytest
import torch
from qhub_rtn.plugin import Rtn, qhub_quantizers
from tiny_models import quantize, tiny_model

from qhub import QuantizedWeights, Scheme, UsageError, quantize_rtn

SCHEMES = ["w4a16-g32-asym", "w3a16-g16-sym", "w8a16", "w2a16-g64-asym", "w5a16-channel-asym"]


def weights_of(source):
    from safetensors.torch import load_file

    return {name.removesuffix(".weight"): tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_is_rounded_to_nearest_on_the_minmax_grid(tmp_path, scheme, dtype):
    source = tiny_model("llama", dtype)
    result = quantize(source, tmp_path, Rtn(), scheme)
    original, written = weights_of(source), QuantizedWeights(tmp_path / "model")
    assert len(result.schemes) == 14
    for name in result.schemes:
        expected, found = quantize_rtn(original[name], Scheme.parse(scheme), dtype), written.layer(name)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero, expected.zero)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_searched_range_is_never_worse_for_any_layer(tmp_path, scheme):
    source = tiny_model("llama")
    original, errors = weights_of(source), {}
    for choice in ("minmax", "mse"):
        result = quantize(source, tmp_path / choice, Rtn(range=choice), scheme)
        written = QuantizedWeights(tmp_path / choice / "model")
        errors[choice] = {name: float((written.layer(name).dequantize() - original[name]).square().sum()) for name in result.schemes}
    assert all(errors["mse"][name] <= errors["minmax"][name] * (1 + 1e-6) for name in errors["mse"])
    if scheme != "w8a16":
        assert sum(errors["mse"].values()) < 0.98 * sum(errors["minmax"].values())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon", "phi3"])
def test_other_families_are_quantized_too(tmp_path, family):
    result = quantize(tiny_model(family), tmp_path, Rtn(), "w4a16-g32-asym")
    assert all(0 < error < 0.02 for error in result.errors)


def test_it_needs_no_data_and_folds_nothing():
    assert Rtn.needs == frozenset()
    assert not Rtn.scales


def test_an_unknown_range_is_a_usage_error():
    with pytest.raises(UsageError) as error:
        Rtn(range="guess")
    assert error.value.message == "option `range` of `rtn` is `guess`"
    assert error.value.hint == "use one of: minmax, mse"


def test_an_unknown_option_is_a_usage_error():
    with pytest.raises(UsageError, match="quantizer `rtn` has no option `bits`"):
        Rtn(bits=4)


def test_the_hook_offers_it_without_importing_torch():
    assert [quantizer.name for quantizer in qhub_quantizers()] == ["rtn"]
    code = "import sys; from qhub_rtn.plugin import qhub_quantizers; qhub_quantizers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
