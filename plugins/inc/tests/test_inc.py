"""Intel Neural Compressor's plugin: what it declares without the tool, what it asks of it, and that its numbers are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qhub_inc.folder import FILE, UnpackedFolder, parts_of
from qhub_inc.plugin import Awq, Gptq, Rtn, qhub_quantizers
from qhub_inc.tool import producers, save, weights
from safetensors.torch import save_file
from torch import nn

from qhub import ModelJob, ModelProfile, PluginError, Scheme

ROOT = Path(__file__).parents[3]
ASYMMETRIC, SYMMETRIC = Scheme.parse("w4a16-g32-asym"), Scheme.parse("w4a16-g32-sym")
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_it_declares_three_methods_and_imports_nothing_heavy():
    path = f"import sys; sys.path[:0] = ['{ROOT}', '{ROOT / 'plugins' / 'inc'}']; "
    source = "import qhub_inc.plugin as p; p.qhub_quantizers(); print(sorted({'torch', 'neural_compressor'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", path + source], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert [method.name for method in qhub_quantizers()] == ["inc-awq", "inc-gptq", "inc-rtn"]


@pytest.mark.parametrize("method", qhub_quantizers(), ids=lambda method: method.name)
def test_every_method_says_what_it_needs_and_takes(method):
    def profile(task: str) -> ModelProfile:
        return ModelProfile("m", "", task, "LlamaForCausalLM", 1, "bf16", 1)

    assert method.whole
    assert bool(method.needs) == (method.name != "inc-rtn")
    assert method.reject(profile("llm"), ASYMMETRIC) is None
    assert method.reject(profile("speech"), ASYMMETRIC) == f"`{method.name}` takes language models, not `speech`"
    assert method.reject(profile("llm"), Scheme.parse("nf4")) == f"`{method.name}` does not write scheme `nf4`"


@pytest.mark.parametrize(("kind", "options"), [(Gptq, {"percdamp": 0.1}), (Awq, {"use_auto_clip": False}), (Rtn, {})])
def test_options_are_the_tools_own(kind, options):
    assert kind(**options).settings == {**kind.options, **options}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16-g128-asym", {"dtype": "int", "bits": 4, "group_size": 128, "use_sym": False}),
        ("w8a16", {"dtype": "int", "bits": 8, "group_size": -1, "use_sym": True}),
    ],
)
def test_a_scheme_in_the_tools_words(scheme, expected):
    assert weights(Scheme.parse(scheme)) == expected


def job(folder: Path, layers: tuple[str, ...], floats: tuple[str, ...] = ()) -> ModelJob:
    return ModelJob(folder, folder, None, {f"model.layers.0.{layer}": ASYMMETRIC for layer in layers}, floats)


def test_awq_is_told_what_folds_into_what_in_a_llama(tmp_path):
    assert producers(job(tmp_path, LLAMA))["mlp.up_proj"] == ("mlp.down_proj",)


@pytest.mark.parametrize(
    ("layers", "floats", "named"),
    [
        (LLAMA[:5], (), "mlp.up_proj"),
        (("attn.qkv",), (), "self_attn.q_proj"),
        (LLAMA, ("model.layers.1.mlp.up_proj",), "model.layers.1.mlp.up_proj"),
    ],
    ids=["a layer is missing", "another architecture", "a layer stays float"],
)
def test_awq_elsewhere_is_refused(tmp_path, layers, floats, named):
    with pytest.raises(PluginError, match=f"`{named}` is not quantized"):
        producers(job(tmp_path, layers, floats))


# From the tool's numbers to ours, and back from the file.


def test_numbers_with_zeros_are_kept():
    unpacked = {"int_weight": torch.tensor([[0, 15]]), "zp": torch.tensor([[7]]), "scales": torch.tensor([[0.5]])}
    parts = parts_of(unpacked, ASYMMETRIC)
    assert (parts["codes"].tolist(), parts["zero"].tolist(), parts["scale"].tolist()) == ([[0, 15]], [[7.0]], [[0.5]])


def test_numbers_without_zeros_are_counted_from_0():
    parts = parts_of({"int_weight": torch.tensor([[-8, 7]]), "zp": None, "scales": torch.tensor([[0.5]])}, SYMMETRIC)
    assert (parts["codes"].tolist(), parts["zero"].tolist()) == ([[0, 15]], [[8.0]])


def test_eight_bits_that_come_signed_are_not():
    unpacked = {
        "int_weight": torch.tensor([[-1, 1]], dtype=torch.int8),
        "zp": torch.tensor([[-128]], dtype=torch.int8),
        "scales": torch.ones(1, 1),
    }
    parts = parts_of(unpacked, Scheme.parse("w8a16-g32-asym"))
    assert (parts["codes"].tolist(), parts["zero"].tolist()) == ([[255, 1]], [[128.0]])


class Unpacking(nn.Linear):
    """Stands where the tool puts its layers."""

    def unpack(self):
        return {"int_weight": torch.full((2, 32), 3), "zp": torch.full((2, 1), 4), "scales": torch.full((2, 1), 0.25)}


def model_of(layer: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"up": layer, "norm": nn.LayerNorm(2)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 2.0)
    return model


def test_layers_are_saved_in_parts_and_the_rest_as_it_is(tmp_path):
    save(model_of(Unpacking(32, 2)), ModelJob(tmp_path, tmp_path, None, {"up": ASYMMETRIC}))
    read = UnpackedFolder(tmp_path)
    assert sorted(read.tensor_names()) == ["norm.bias", "norm.weight"]  # not the bias of zeros that the tool adds
    assert torch.equal(read.tensor("norm.weight"), torch.full((2,), 2.0))
    layer = read.layer("up")
    assert torch.equal(layer.dequantize(), torch.full((2, 32), -0.25))
    assert (layer.bits, layer.symmetric, layer.group_size) == (4, False, 32)


def test_a_layer_that_the_tool_left_is_refused(tmp_path):
    with pytest.raises(PluginError, match="made `up` a `Linear`, which cannot be stored"):
        save(model_of(nn.Linear(32, 2)), ModelJob(tmp_path, tmp_path, None, {"up": ASYMMETRIC}))


def test_what_was_saved_is_listed_without_the_parts(tmp_path):
    save_file({"a.codes": torch.zeros(1), "a.facts": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / FILE)
    assert list(UnpackedFolder(tmp_path).tensor_names()) == ["b"]
