"""The reference is the float model's own code on dequantized weights; an artifact is compared with it number by number."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import quantize, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from qhub import Exporter, Quantizer, Runtime, quantize_rtn
from qhub.errors import DamagedModelError
from qhub.prove.parity import Codes, compare_codes, compare_logits, read_codes, reference_logits
from qhub.quantize.observe import set_weight
from qhub.quantize.store import METADATA, QuantizedWeights

IDS = random_ids(2, 32)


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


class Session:
    """Answers with the reference, moved by `offset` in one place."""

    def __init__(self, path, offset):
        self.path = path
        self.offset = offset
        self.closed = False

    def logits(self, ids):
        if self.offset is None:
            raise RuntimeError("no")
        found = reference_logits(self.path, torch.from_numpy(ids)).numpy()
        found[1, 2, 3] += self.offset
        return found

    def close(self):
        self.closed = True


class Offset(Runtime):
    """A runtime that is wrong by so much."""

    name = "offset"

    def __init__(self, offset=0.0):
        self.offset = offset
        self.sessions = []

    def open(self, path, options=None):
        self.sessions.append(Session(path, self.offset))
        return self.sessions[-1]


@pytest.fixture
def quantized(tmp_path):
    """A QuantizedModel."""
    quantize(tiny_model("llama"), tmp_path, Nearest(), "w4a16-g32-asym", overrides={"down_proj": "w8a16", "o_proj": "float"})
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon-alibi"])
@torch.no_grad()
def test_the_reference_is_the_float_models_code_on_dequantized_weights(tmp_path, family, dtype):
    source = tiny_model(family, dtype)
    quantize(source, tmp_path, Nearest(), "w4a16-g32-asym")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    before = model(IDS).logits.float()
    weights = QuantizedWeights(tmp_path / "model")
    for name in weights.schemes:
        set_weight(model.get_submodule(name), weights.layer(name).dequantize())
    reference = reference_logits(tmp_path / "model", IDS)
    assert torch.equal(reference, model(IDS).logits.float())
    assert reference.dtype == torch.float32
    assert not torch.equal(reference, before)


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.25])
def test_the_largest_difference_is_reported(quantized, offset):
    runtime = Offset(offset)
    found = compare_logits(quantized, quantized, runtime, IDS.numpy())
    assert found == {
        "checked": True,
        "max_abs_diff": pytest.approx(abs(offset), abs=1e-5),
        "codes_identical": True,
        "top1_agreement": pytest.approx(1.0, abs=0.02),
        "how": "opened with `offset`; logits of 64 tokens against qhub's reference; codes read back from the file",
    }
    assert [session.closed for session in runtime.sessions] == [True]


def test_a_runtime_that_fails_is_closed_too(quantized):
    runtime = Offset(None)
    with pytest.raises(RuntimeError):
        compare_logits(quantized, quantized, runtime, IDS.numpy())
    assert [session.closed for session in runtime.sessions] == [True]


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
CHANGES = {
    "a code": (1, f"{UP}.weight_packed", 1),
    "a zero point": (1, f"{UP}.weight_zero_point", 1),
    "a scale": (2, f"{DOWN}.weight_scale", 0.5),
}


@pytest.mark.parametrize(("shard", "name", "added"), CHANGES.values(), ids=CHANGES)
def test_one_number_that_differs_is_seen(quantized, tmp_path, shard, name, added):
    artifact = tmp_path / "artifact"
    shutil.copytree(quantized, artifact)
    path = artifact / f"model-{shard + 1:05d}-of-00003.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] += added
    save_file(tensors, path)
    layer = name.rpartition(".")[0]
    assert read_codes(quantized, artifact) == Codes(False, layer)
    for compared in (
        lambda: compare_logits(quantized, artifact, Offset(), IDS.numpy()),
        lambda: compare_codes(quantized, artifact, "nothing opens it"),
    ):
        with pytest.raises(DamagedModelError, match=f"are not those that were quantized, first in layer `{layer}`"):
            compared()


def test_logits_that_are_others_fail_with_how_much(quantized):
    with pytest.raises(DamagedModelError, match=r"logits of `offset` are .*% off qhub's reference; 2% is rounding"):
        compare_logits(quantized, quantized, Offset(1e3), IDS.numpy())


class Reading(Exporter):
    """Reads back what the QuantizedModel holds, but for one change."""

    def __init__(self, change):
        self.change = change

    def read_layers(self, path):
        weights = QuantizedWeights(path)
        return self.change({name: weights.layer(name) for name in weights.schemes})


def with_code(layers):
    codes = layers[UP].codes.clone()
    codes[0, 0] ^= 1
    return {**layers, UP: dataclasses.replace(layers[UP], codes=codes)}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda layers: layers, Codes(True)),
        (with_code, Codes(False, UP)),
        (lambda layers: {name: layer for name, layer in layers.items() if name != DOWN}, Codes(False, DOWN)),
        (lambda layers: {**layers, "more": layers[UP]}, Codes(False, "more")),
        (lambda layers: {**layers, UP: dataclasses.replace(layers[UP], symmetric=True)}, Codes(False, UP)),
    ],
    ids=["the same", "a code", "a layer missing", "a layer more", "said to be symmetric"],
)
def test_what_an_exporter_reads_back_is_compared_layer_by_layer(quantized, change, wanted):
    assert read_codes(quantized, quantized, Reading(change)) == wanted


def test_codes_of_a_format_that_qhub_does_not_read_are_unknown(quantized, tmp_path):
    class Elsewhere(Offset):
        """Reads another format; its figures are the QuantizedModel's."""

        def open(self, path, options=None):
            return super().open(quantized, options)

    (tmp_path / "model.other").write_bytes(b"")
    found = compare_logits(quantized, tmp_path / "model.other", Elsewhere(), IDS.numpy())
    assert (found["checked"], found["codes_identical"], found["max_abs_diff"]) == (True, None, pytest.approx(0, abs=1e-5))
    assert not (tmp_path / METADATA).exists()
