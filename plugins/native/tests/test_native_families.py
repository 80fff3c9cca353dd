"""The runtime against qhub's torch reference: every family, every way that positions turn, odd schemes."""

import json

import numpy as np
import pytest
import torch
from qhub_native import _native
from qhub_native.load import Options
from qhub_native.session import NativeSession
from tiny_models import FAMILIES, quantize, random_ids, tiny_model

from qhub import QuantizedWeights, Unsupported
from qhub.plugins import Plugins

RUNS = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
KERNELS = _native.kernel_names()


def rtn():
    return Plugins.load().quantizers["rtn"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family, scheme, overrides → the folder of its QuantizedModel, made once."""
    folders = {}

    def make(family, scheme="w4a16-g32-asym", **overrides):
        key = family, scheme, *overrides
        if key not in folders:
            out = tmp_path_factory.mktemp("model")
            quantize(tiny_model(family), out, rtn(), scheme, overrides=overrides)
            folders[key] = out / "model"
        return folders[key]

    return make


def reference(folder, ids, **config_changes):
    """Logits of transformers in float32 with the dequantized weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    config = AutoConfig.for_model(**{**settings, **config_changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = QuantizedWeights(folder)
    state = {}
    for name in weights:
        layer = name.removesuffix(".weight")
        state[name] = weights.layer(layer).dequantize(torch.float32) if layer in weights.schemes else weights.read(name).float()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(ids).logits.numpy()


def session(folder, kernel=KERNELS[0], *, exact=True, threads=2):
    return NativeSession(folder, Options(threads, kernel, exact=exact, forced=True))


def off(found, wanted):
    """The largest difference as a share of the range of logits."""
    return np.abs(found - wanted).max() / np.ptp(wanted)


@pytest.mark.parametrize("family", RUNS)
def test_exact_logits_are_those_of_the_reference(family, made):
    ids = random_ids(3, 70)
    found = session(made(family)).logits(ids.numpy())
    assert found.shape == (3, 70, FAMILIES[family].get("vocab_size", 128))
    assert off(found, reference(made(family), ids)) < 1e-4


@pytest.mark.parametrize("family", RUNS)
def test_fast_logits_are_near_the_exact_ones(family, made):
    ids = random_ids(2, 70).numpy()
    assert off(session(made(family), exact=False).logits(ids), session(made(family)).logits(ids)) < 0.05


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_exact_logits(kernel, made):
    ids = random_ids(2, 40)
    assert off(session(made("llama"), kernel).logits(ids.numpy()), reference(made("llama"), ids)) < 1e-4


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g64-sym", "w3a16-g32-asym", "w3a16-g64-sym", "w2a16-g32-asym", "w8a16-g64-sym", "w8a16-gchannel-asym", "w5a16-g32-sym"],
)
def test_schemes_of_other_bits_and_groups_are_exact_too(scheme, made):
    folder, ids = made("llama", scheme.replace("gchannel", "channel")), random_ids(2, 40)
    assert off(session(folder).logits(ids.numpy()), reference(folder, ids)) < 1e-4


def test_layers_of_different_schemes_and_float_layers_run_beside_each_other(made):
    folder = made("llama", **{"*.k_proj": "w8a16-g32-sym", "*.0.*.up_proj": "float", "*.down_proj": "float"})
    ids = random_ids(2, 40)
    assert off(session(folder).logits(ids.numpy()), reference(folder, ids)) < 1e-4


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "part of a head": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_are_those_of_transformers(name, made, tmp_path):
    family = "phi3" if "partial_rotary_factor" in ROPES[name] else "llama"
    folder = copied(made(family), tmp_path, {"rope_parameters": {"rope_theta": 10000.0, **ROPES[name]}})
    ids = random_ids(1, 100)
    assert off(session(folder).logits(ids.numpy()), reference(folder, ids)) < 1e-4


def copied(folder, to, changes):
    """The model under another config.json."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "falcon"}, "`falcon` models"),
        ({"hidden_act": "relu2"}, "activation `relu2`"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling `longrope`"),
    ],
    ids=["family", "activation", "rope"],
)
def test_what_is_not_known_is_refused_by_name_with_the_alternative(changes, words, made, tmp_path):
    with pytest.raises(Unsupported, match=words) as caught:
        session(copied(made("llama"), tmp_path, changes))
    assert "--runtime hf" in caught.value.hint


def test_a_group_of_16_is_refused_with_the_groups_that_work(made):
    with pytest.raises(Unsupported, match="groups of 16") as caught:
        session(made("llama", "w4a16-g16-asym"))
    assert "g32" in caught.value.hint


def test_prefill_in_pieces_and_token_by_token_agree(made):
    model, ids = session(made("gemma3_text")), random_ids(1, 60).numpy()[0]
    whole = model.logits(ids[None])[0]
    grown = model.sequence(60)
    pieces = [model.feed(grown, part) for part in (ids[:17], ids[17:40], *([token] for token in ids[40:]))]
    assert off(pieces[0], whole[16]) < 1e-5
    assert off(np.stack(pieces[2:]), whole[40:]) < 1e-5


def test_sequences_of_different_lengths_run_in_one_step(made):
    model, ids = session(made("llama")), random_ids(3, 50).numpy()
    sequences = [model.sequence(60) for _ in range(3)]
    parts = [np.ascontiguousarray(row[:length], dtype=np.int32) for row, length in zip(ids, (50, 7, 23), strict=True)]
    together = np.asarray(model.loaded.decoder.step(sequences, parts, "last"))
    alone = np.stack([model.feed(model.sequence(60), part) for part in parts])
    assert off(together, alone) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_keys_and_values_of_8_bits_take_half_the_room_and_change_little(family, made):
    ids = random_ids(1, 90).numpy()[0]
    halves, bytes_ = NativeSession(made(family), Options(1, KERNELS[0], cache_bits=8)), []
    whole = NativeSession(made(family), Options(1, KERNELS[0]))
    rows = []
    for model in (whole, halves):
        sequence = model.sequence()
        rows.append(np.stack([model.feed(sequence, ids[:40]), *(model.feed(sequence, [token]) for token in ids[40:])]))
        bytes_.append(sequence.bytes_used)
    assert off(rows[1], rows[0]) < 0.05
    assert 0.5 <= bytes_[1] / bytes_[0] < 0.8  # heads of 16 numbers: a scale of four bytes is a quarter more


def test_the_number_of_threads_changes_no_bit(made):
    ids = random_ids(2, 64).numpy()
    one, three = (session(made("llama"), exact=False, threads=threads).logits(ids) for threads in (1, 3))
    assert np.array_equal(one, three)


def test_truncating_a_sequence_forgets_what_came_after(made):
    model, ids = session(made("llama")), random_ids(1, 40).numpy()[0]
    grown = model.sequence(64)
    model.feed(grown, ids)
    grown.truncate(20)
    again = model.feed(grown, ids[20:30])
    assert np.array_equal(again, model.feed(model.sequence(64), ids[:30])) or off(again, model.feed(model.sequence(64), ids[:30])) < 1e-5
