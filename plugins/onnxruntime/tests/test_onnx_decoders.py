"""Decoders as ONNX graphs: every family and scheme against transformers on the dequantized weights, and codes read back."""

import json

import numpy as np
import onnx
import pytest
from onnx_models import EXPORTERS, exported, opened
from references import off, reference
from tiny_models import random_ids

from qhub import QuantizedWeights, Unsupported

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
#: Of four bits in both operators, of other widths, of groups that are made of several blocks, and one scale per output.
SCHEMES = [
    "w4a16-g32-sym", "w4a16-g16-asym", "w4a16-g64-asym", "w4a16-channel-sym", "w2a16-g32-asym", "w2a16-g16-sym", "w3a16-g64-sym",
    "w3a16-g32-asym", "w5a16-g32-sym", "w6a16-g64-asym", "w7a16-channel-asym", "w8a16-g64-sym", "w8a16-channel-asym",
]  # fmt: skip
BOTH = pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda exporter: exporter.format)


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits_are_those_of_the_reference(family, exporter):
    model, ids = exported(family, "w4a16-g32-asym", exporter), random_ids(3, 70)
    found = opened(model.artifact).logits(ids.numpy())
    assert (found.dtype, found.shape) == (np.float32, (3, 70, 128))
    assert off(found, reference(model.quantized, ids)) < 1e-5


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_exact_and_its_codes_are_read_back(scheme, exporter):
    model, ids = exported("llama", scheme, exporter), random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5
    assert_the_same(model, exporter)


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_scales_and_zeros_of_every_family_are_read_back(family, exporter):
    assert_the_same(exported(family, "w4a16-g32-asym", exporter), exporter)


def assert_the_same(model, exporter):
    weights, found = QuantizedWeights(model.quantized), exporter.read_layers(model.artifact)
    assert found.keys() == weights.schemes.keys()
    assert [name for name in found if not found[name].equals(weights.layer(name))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_activations_stay_near_the_exact_logits(family):
    model, ids = exported(family, "w4a16-g32-asym"), random_ids(2, 70).numpy()
    rounded = opened(model.artifact, exact=False).logits(ids)
    difference = off(rounded, opened(model.artifact).logits(ids))
    assert 0 < difference < 0.06  # of numbers that cancel more than in trained models


def test_layers_of_different_schemes_and_float_layers_run_beside_each_other():
    overrides = {"*.k_proj": "w8a16-g32-sym", "*.0.*.up_proj": "float", "*.down_proj": "float"}
    model, ids = exported("llama", "w4a16-g32-asym", **overrides), random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5
    assert_the_same(model, EXPORTERS[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float_matrices_keep_the_dtype_they_were_stored_in(dtype):
    model = exported("llama", "w4a16-g32-asym", dtype=dtype)
    kinds = {tensor.name: tensor.data_type for tensor in graph_of(model).initializer}
    wanted = getattr(onnx.TensorProto, dtype.upper())
    assert (kinds["model.embed_tokens.weight"], kinds["lm_head.weight"]) == (wanted, wanted)
    ids = random_ids(2, 40)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "part of a head": {"rope_type": "default", "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_are_those_of_transformers(name):
    family = "phi3" if "partial_rotary_factor" in ROPES[name] else "llama"
    model = exported(family, "w4a16-g32-asym", config={"rope_parameters": {"rope_theta": 10000.0, **ROPES[name]}})
    ids = random_ids(1, 100)
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5


def test_heads_that_attention_does_not_turn_itself_are_turned_before_it():
    model, ids = exported("llama", "w4a16-g32-asym", heads=8), random_ids(2, 70)
    assert {"RotaryEmbedding", "GroupQueryAttention"} <= {node.op_type for node in graph_of(model).node}
    assert off(opened(model.artifact).logits(ids.numpy()), reference(model.quantized, ids)) < 1e-5


def graph_of(model):
    return onnx.load_model(model.artifact / "model.onnx", load_external_data=False).graph


# What the graph is made of.
def test_a_quantized_layer_is_one_operator_with_the_files_own_bytes():
    model = exported("llama", "w4a16-g32-asym")
    graph = graph_of(model)
    operators = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(operators) == 14
    attributes = {attribute.name: attribute.i for attribute in operators[-1].attribute}
    assert attributes == {"K": 128, "N": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    down = "model.layers.1.mlp.down_proj"
    assert [shapes[f"{down}.{part}"] for part in ("codes", "scales", "zeros")] == [(64, 4, 16), (64, 4), (64, 2)]


def test_the_other_format_has_dequantize_linear_of_four_bits():
    model = exported("llama", "w4a16-g32-sym", EXPORTERS[1])
    graph = graph_of(model)
    operators = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert len(operators) == 14
    assert {kinds[node.input[0]] for node in operators} == {onnx.TensorProto.INT4}
    assert {len(node.input) for node in operators} == {2}  # symmetric: no zeros, as some engines want it
    assert not [node for node in graph.node if node.op_type == "MatMulNBits"]


def test_inputs_and_outputs_are_those_of_a_cache_of_any_length_and_batch():
    graph = graph_of(exported("llama", "w4a16-g32-asym"))
    shapes = {
        value.name: [part.dim_param or part.dim_value for part in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert shapes["present.0.key"] == ["batch", 2, "kept", 16]
    assert shapes["logits"] == ["batch", "wanted", 128]


def test_the_folder_has_the_tokenizer_and_no_tensors_of_the_source():
    model = exported("llama", "w4a16-g32-asym")
    names = {path.name for path in model.artifact.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert json.loads((model.artifact / "config.json").read_text())["quantization_config"] == {"quant_method": "onnx"}


# What is refused.
def test_heads_of_an_odd_size_are_refused_before_anything_is_written():
    with pytest.raises(Unsupported, match="heads of a multiple of 8 numbers; these have 4") as caught:
        exported("llama", "w4a16-g32-asym", heads=16)
    assert caught.value.hint == "`--plugin hf` carries it"


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_families_that_are_not_described_are_refused_by_name(family):
    with pytest.raises(Unsupported, match=f"`onnxruntime` does not run `{family}` models"):
        exported(family, "w4a16-g32-asym")
