"""What the files of a decoder say, for every engine: configs, the places of tensors, packed layers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import quantize, tiny_model
from transformers import AutoConfig

from qhub import DecoderFiles, QhubError, QuantizedWeights, Quantizer, Unsupported, decoder_config, open_decoder, quantize_rtn
from qhub.decoders.session import drawn

KNOWN = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


def config_of(family):
    return json.loads((tiny_model(family) / "config.json").read_text())


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(family, scheme) → its QuantizedModel, opened."""
    made = {}

    def open_one(family, scheme="w4a16-g32-asym") -> DecoderFiles:
        if (family, scheme) not in made:
            out = tmp_path_factory.mktemp("model")
            quantize(tiny_model(family), out, Nearest(), scheme)
            made[family, scheme] = open_decoder(out / "model", "the engine")
        return made[family, scheme]

    return open_one


@pytest.mark.parametrize("family", KNOWN)
def test_the_sizes_are_those_that_transformers_reads(family):
    found, wanted = decoder_config(config_of(family), "the engine"), AutoConfig.from_pretrained(tiny_model(family))
    assert (found.hidden, found.layers, found.heads) == (wanted.hidden_size, wanted.num_hidden_layers, wanted.num_attention_heads)
    assert (found.kv_heads, found.ffn, found.context) == (wanted.num_key_value_heads, wanted.intermediate_size, 128)
    assert (found.kind, found.stops, len(found.windows), len(found.ropes)) == (wanted.model_type, (2,), 2, 2)


# Gemma 2 and 3 look at a window in some layers, Mistral in all; Qwen only if it says so.
@pytest.mark.parametrize(
    ("family", "windows"),
    [("llama", (0, 0)), ("mistral", (16, 16)), ("qwen2", (0, 0)), ("gemma2", (16, 0)), ("gemma3_text", (16, 0))],
)
def test_each_layer_sees_the_positions_that_its_family_says(family, windows):
    assert decoder_config(config_of(family), "the engine").windows == windows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "falcon"}, "`the engine` does not run `falcon` models; it runs gemma2"),
        ({"hidden_act": "relu2"}, "`the engine` does not know activation `relu2`"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "`the engine` does not know rope scaling `longrope`"),
    ],
    ids=["family", "activation", "rope"],
)
def test_what_is_not_known_is_refused_in_the_name_of_the_engine(changes, words):
    with pytest.raises(Unsupported, match=words) as caught:
        decoder_config({**config_of("llama"), **changes}, "the engine")
    assert "--runtime hf" in caught.value.hint


@pytest.mark.parametrize("family", KNOWN)
def test_every_tensor_of_a_model_has_its_place(family, opened):
    files = opened(family)
    linears = [name for block in range(2) for names in files.linears(block).values() for name in names]
    assert set(linears) == set(files.schemes)
    norms = sum(len(files.norms(block)) for block in range(2)) + 1
    biases = sum(files.bias(name) is not None for name in linears)
    matrices = 1 if files.config.tied else 2
    stored = [name for name in files.tensors.files if ".weight_" not in name]
    assert len(stored) == norms + biases + matrices
    assert all(files.shape(name) == tuple(QuantizedWeights(files.folder).read(f"{name}.weight").shape) for name in linears)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w3a16-g32-asym", "w2a16-g16-asym", "w8a16-channel-asym", "w5a16-g64-sym"])
def test_a_packed_layer_holds_the_scales_and_zeros_of_the_qtensor(scheme, opened):
    files, name = opened("llama", scheme), "model.layers.1.mlp.down_proj"
    layer, wanted = files.packed(name), QuantizedWeights(files.folder).layer(name)
    assert (layer.outputs, layer.inputs, layer.every) == (64, 128, wanted.group_size)
    assert np.array_equal(layer.scale, wanted.scale.numpy())
    assert (layer.zero is None) == wanted.symmetric
    if layer.zero is not None:
        assert np.array_equal(layer.zero, wanted.zero.to(torch.uint8).numpy())
    bits = np.unpackbits(layer.codes, axis=1, bitorder="little", count=128 * wanted.bits).reshape(64, 128, wanted.bits)
    assert np.array_equal(np.packbits(bits, axis=2, bitorder="little")[:, :, 0], wanted.codes.numpy())


def test_norms_of_gemma_are_given_as_what_is_multiplied(opened):
    files = opened("gemma2")
    stored = files.tensors.floats("model.layers.0.input_layernorm.weight")
    assert np.array_equal(files.norms(0)["attention"], stored + 1)


def test_a_float_model_is_refused_with_what_makes_one(tmp_path):
    with pytest.raises(Unsupported, match=r"it has no qhub\.json"):
        open_decoder(tiny_model("llama"), "the engine")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"model_type": "llama"}', "lacks or garbles 'hidden_size'"),
        ("qhub.json", '{"format_version": 1}', "lacks or garbles 'layers'"),
    ],
    ids=["cut", "another value", "a size missing", "no layers"],
)
def test_damage_is_one_error(file, text, words, opened, tmp_path):
    for path in opened("llama").folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(QhubError, match=words):
        open_decoder(tmp_path, "the engine")


def test_a_tensor_that_is_missing_is_named(opened):
    with pytest.raises(QhubError, match=r"has no tensor `model\.layers\.7\.x`"):
        opened("llama").tensors.info("model.layers.7.x")


def test_only_the_most_probable_tokens_that_have_top_p_together_are_drawn():
    logits, random = np.log(np.array([0.1, 0.5, 0.4], dtype=np.float32)), np.random.default_rng(0)
    assert {drawn(logits, 1.0, 0.6, random) for _ in range(200)} == {1, 2}
    assert {drawn(logits, 1.0, 0.45, random) for _ in range(50)} == {1}
    assert {drawn(logits, 1.0, 1.0, random) for _ in range(200)} == {0, 1, 2}
