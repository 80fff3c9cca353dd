"""llm-compressor's plugin: what it declares without the tool, what it asks of the tool, and that it reads the tool's folders exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qhub_llmcompressor.folder import CompressedFolder
from qhub_llmcompressor.plugin import AutoRound, Awq, Gptq, Rtn, qhub_quantizers
from qhub_llmcompressor.tool import awq_mappings, targets, weights
from safetensors.torch import save_file

from qhub import ModelJob, ModelProfile, PluginError, Scheme

ROOT = Path(__file__).parents[3]
LAYER = "model.layers.0.mlp.up_proj"


def profile(task: str) -> ModelProfile:
    return ModelProfile("m", "", task, "LlamaForCausalLM", 1, "bf16", 1)


def test_it_declares_four_methods_and_imports_nothing_heavy():
    heavy = "{'torch', 'llmcompressor', 'transformers', 'compressed_tensors'}"
    source = f"import sys; import qhub_llmcompressor.plugin as p; p.qhub_quantizers(); print(sorted({heavy} & set(sys.modules)))"
    path = f"import sys; sys.path[:0] = ['{ROOT}', '{ROOT / 'plugins' / 'llmcompressor'}']; "
    ran = subprocess.run([sys.executable, "-c", path + source], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
    names = [method.name for method in qhub_quantizers()]
    assert names == ["llmcompressor-awq", "llmcompressor-gptq", "llmcompressor-autoround", "llmcompressor-rtn"]


@pytest.mark.parametrize("method", qhub_quantizers(), ids=lambda method: method.name)
def test_every_method_says_what_it_needs(method):
    assert method.whole
    assert bool(method.needs) == (method.name != "llmcompressor-rtn")
    assert (method.distribution, method.requires) == ("qhub-llmcompressor", ("llmcompressor", "compressed_tensors"))
    assert method.reject(profile("llm"), Scheme.parse("w4a16-g128-asym")) is None
    assert method.reject(profile("vision"), Scheme.parse("w4a16-g128-asym")) == f"`{method.name}` takes language models, not `vision`"
    assert method.reject(profile("llm"), Scheme.parse("w8a8-static")) == f"`{method.name}` does not write scheme `w8a8-static`"


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Gptq, {"damping": 0.02}), (Awq, {"duo_scaling": "both"}), (AutoRound, {"iterations": 5, "batch_size": 2}), (Rtn, {})],
    ids=["gptq", "awq", "autoround", "rtn"],
)
def test_options_are_the_tools_own(kind, options):
    assert kind(**options).settings == {**kind.options, **options}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16-g128-asym", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}),
        ("w8a16", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    ],
)
def test_a_scheme_in_the_tools_words(scheme, expected):
    assert weights(Scheme.parse(scheme)) == expected


def test_layers_are_named_one_by_one_under_their_scheme():
    four, eight = Scheme.parse("w4a16-g32-sym"), Scheme.parse("w8a16-g32-sym")
    asked = targets({"a.q": four, "a.down": eight, "a.k": four})
    assert [group["targets"] for group in asked["config_groups"].values()] == [["a.q", "a.k"], ["a.down"]]
    assert [group["weights"]["num_bits"] for group in asked["config_groups"].values()] == [4, 8]


def test_the_tool_chooses_its_awq_mappings_where_all_layers_are_quantized(tmp_path):
    assert awq_mappings(ModelJob(tmp_path, tmp_path, None, {})) is None


# What it reads, written by compressed-tensors itself.


@pytest.fixture
def folder(tmp_path):
    """Write a folder as the tool saves it; returns its path and what went in."""
    packing = pytest.importorskip("compressed_tensors.compressors")

    def write(bits: int, *, symmetric: bool, extra: dict | None = None, form: str = "pack-quantized"):
        pack = pack_function(packing)
        generator = torch.Generator().manual_seed(bits)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        codes = torch.randint(low, high + 1, (64, 128), generator=generator, dtype=torch.int8)
        zero = torch.randint(low, high + 1, (64, 4), generator=generator, dtype=torch.int8)
        scale = torch.rand(64, 4, generator=generator).to(torch.bfloat16)
        stored = {"weight_packed": pack(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([64, 128])}
        if not symmetric:
            stored["weight_zero_point"] = pack(zero, bits, packed_dim=0).contiguous()
        named = {f"{LAYER}.{part}": tensor for part, tensor in stored.items()}
        save_file({**named, "model.norm.weight": torch.ones(8), **(extra or {})}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"format": form}}))
        return tmp_path, codes, zero, scale

    return write


def pack_function(compressors):
    """compressed-tensors moved it between its versions."""
    for path in ("pack_quantized.helpers", "quantized_compressors.pack_quantized", "pack_quantized"):
        try:
            return __import__(f"{compressors.__name__}.{path}", fromlist=["pack_to_int32"]).pack_to_int32
        except (ImportError, AttributeError):
            continue
    pytest.skip("this compressed-tensors has its packing elsewhere")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_layer_is_read_as_it_was_written(folder, bits, symmetric):
    path, codes, zero, scale = folder(bits, symmetric=symmetric)
    offset = 1 << (bits - 1)
    found = CompressedFolder(path).layer(LAYER)
    assert torch.equal(found.codes, (codes.int() + offset).to(torch.uint8))
    assert torch.equal(found.scale, scale.float())
    assert torch.equal(found.zero, torch.full((64, 4), float(offset)) if symmetric else zero.float() + offset)
    assert (found.bits, found.symmetric, found.group_size) == (bits, symmetric, 32)


def test_what_is_no_part_of_a_layer_is_listed_and_read_as_it_is(folder):
    read = CompressedFolder(folder(4, symmetric=False)[0])
    assert list(read.tensor_names()) == ["model.norm.weight"]
    assert torch.equal(read.tensor("model.norm.weight"), torch.ones(8))


def test_columns_in_an_order_of_their_own_are_refused(folder):
    path, *_ = folder(4, symmetric=False, extra={f"{LAYER}.weight_g_idx": torch.arange(128)})
    with pytest.raises(PluginError, match=f"left `{LAYER}` float, or ordered its columns"):
        CompressedFolder(path).layer(LAYER)


def test_a_layer_left_float_is_refused(folder):
    with pytest.raises(PluginError, match=r"left `model.norm` float"):
        CompressedFolder(folder(4, symmetric=False)[0]).layer("model.norm")


def test_another_format_is_refused(folder):
    with pytest.raises(PluginError, match="wrote the format `int-quantized`, not `pack-quantized`"):
        CompressedFolder(folder(4, symmetric=False, form="int-quantized")[0])
