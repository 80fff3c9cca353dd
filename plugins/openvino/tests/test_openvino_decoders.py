"""Decoders as IR: every family and scheme against transformers on the dequantized weights, and codes read back."""

import json

import numpy as np
import pytest
from qhub_openvino.plugin import OpenVinoExporter
from qhub_openvino.vendor import ov
from references import off, reference
from tiny_models import random_ids

from qhub import QuantizedWeights, Unsupported, folder_digest

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
#: Of the two widths that OpenVINO has, of others that lie in them, and one scale per output.
SCHEMES = [
    "w4a16-g32-sym", "w4a16-g16-asym", "w4a16-channel-sym", "w2a16-g32-asym", "w3a16-g64-sym", "w5a16-g32-sym", "w6a16-g64-asym",
    "w7a16-channel-asym", "w8a16-g64-sym", "w8a16-channel-asym", "w8a16",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits_are_those_of_the_reference_and_codes_are_read_back(family, exported, opened):
    model, ids = exported(family), random_ids(3, 70)
    found = opened(model.artifact).logits(ids.numpy())
    assert (found.dtype, found.shape) == (np.float32, (3, 70, 128))
    assert off(found, reference(model.quantized, ids)) < 1e-5
    assert_the_same(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_exact_and_its_codes_are_read_back(scheme, exported, opened):
    model, ids = exported("llama", scheme), random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5
    assert_the_same(model)


def assert_the_same(model):
    weights, found = QuantizedWeights(model.quantized), OpenVinoExporter().read_layers(model.artifact)
    assert found.keys() == weights.schemes.keys()
    assert [name for name in found if not found[name].equals(weights.layer(name))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_activations_stay_near_the_exact_logits(family, exported, opened):
    model, ids = exported(family), random_ids(2, 70).numpy()
    assert off(opened(model.artifact, exact=False).logits(ids), opened(model.artifact).logits(ids)) < 0.1  # bfloat16, tiny heads


def test_layers_of_different_schemes_and_float_layers_run_beside_each_other(exported, opened):
    overrides = {"*.k_proj": "w8a16-g32-sym", "*.0.*.up_proj": "float", "*.down_proj": "float"}
    model, ids = exported("llama", "w4a16-g32-asym", **overrides), random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5
    assert_the_same(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float_matrices_keep_the_dtype_they_were_stored_in(dtype, exported, opened):
    model = exported("llama", dtype=dtype)
    kinds = {node.get_friendly_name(): node.get_element_type().get_type_name() for node in constants(model)}
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert (kinds["model.embed_tokens.weight"], kinds["lm_head.weight"]) == (short, short)
    ids = random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "part of a head": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_are_those_of_transformers(name, exported, opened):
    family = "phi3" if "partial_rotary_factor" in ROPES[name] else "llama"
    model = exported(family, config={"rope_parameters": {"rope_theta": 10000.0, **ROPES[name]}})
    ids = random_ids(1, 100)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5


# What the IR is made of.
def model_of(model):
    return ov.Core().read_model(model.artifact / "openvino_model.xml")


def constants(model):
    return [node for node in model_of(model).get_ops() if node.get_type_name() == "Constant"]


@pytest.mark.parametrize(
    ("scheme", "kind", "zeros"), [("w4a16-g32-sym", "i4", False), ("w4a16-g32-asym", "u4", True), ("w8a16", "i8", False)]
)
def test_codes_are_integer_constants_with_half_precision_scales(scheme, kind, zeros, exported):
    found = {node.get_friendly_name(): node for node in constants(exported("llama", scheme))}
    down = "model.layers.1.mlp.down_proj"
    assert found[f"{down}.codes"].get_element_type().get_type_name() == kind
    assert found[f"{down}.scales"].get_element_type().get_type_name() == "f16"
    assert (f"{down}.zeros" in found) == zeros
    groups = [64, 128] if scheme == "w8a16" else [64, 4, 32]
    assert list(found[f"{down}.codes"].shape) == groups


def test_inputs_and_states_are_those_that_openvino_genai_gives(exported):
    model = model_of(exported("llama"))
    assert [put.any_name for put in model.inputs] == ["input_ids", "attention_mask", "position_ids", "beam_idx"]
    assert [put.any_name for put in model.outputs] == ["logits"]
    names = {f"past_key_values.{block}.{part}present.{block}.{part}" for block in (0, 1) for part in ("key", "value")}
    assert {state.info.variable_id for state in model.get_variables()} == names


def test_the_cpu_makes_one_operation_of_norms_positions_and_attention(exported, opened):
    made = opened(exported("llama").artifact).compiled.get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in made]
    counts = {kind: kinds.count(kind) for kind in ("ScaledDotProductAttention", "RoPE", "RMS", "FullyConnected")}
    assert counts == {"ScaledDotProductAttention": 2, "RoPE": 4, "RMS": 5, "FullyConnected": 15}


def test_the_folder_has_the_tokenizer_and_nothing_left_over(exported):
    model = exported("llama")
    names = {path.name for path in model.artifact.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".tmp"))]
    assert json.loads((model.artifact / "config.json").read_text())["quantization_config"] == {"quant_method": "openvino"}


def test_the_same_model_gives_the_same_bytes(exported, export, tmp_path):
    model = exported("llama")
    again = export(model.quantized, tmp_path)
    assert (again.bytes, again.sha256) == folder_digest(model.artifact)


def test_a_family_that_is_not_known_is_refused_and_nothing_is_written(exported, export, tmp_path):
    model = exported("llama")
    other = tmp_path / "other"
    other.mkdir()
    for path in model.quantized.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps({**json.loads((model.quantized / "config.json").read_text()), "model_type": "bloom"}))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Unsupported, match="`openvino` does not run `bloom` models"):
        export(other, out)
    assert not list(out.iterdir())
