"""The engine: tokens in pieces, conversations, sampling, devices; and files that are damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from qhub_openvino.devices import settings
from qhub_openvino.plugin import OpenVinoExporter, OpenVinoRuntime
from qhub_openvino.vendor import ov
from references import off, reference
from tiny_models import random_ids

from qhub import OpenOptions, QhubError, Unsupported, UsageError

IDS = random_ids(3, 70)
PROMPT = IDS[0, :10].tolist()
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3"]


@pytest.fixture
def model(exported):
    """A tiny Llama, exported."""
    return exported("llama")


@pytest.fixture
def session(model, opened):
    """It, opened."""
    return opened(model.artifact)


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the artifact that a test may damage."""
    return shutil.copytree(model.artifact, tmp_path / "copy")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_and_token_by_token_give_the_logits_of_the_whole(family, exported, opened):
    model = exported(family)
    session, wanted = opened(model.artifact), reference(model.quantized, IDS[:1])[0]
    cache, ids = session.cache(80), IDS[0].tolist()
    found = [session.feed(cache, part).copy() for part in (ids[:17], ids[17:40], *([token] for token in ids[40:]))]
    assert off(found[0], wanted[16]) < 1e-5
    assert off(np.stack(found[1:]), wanted[39:]) < 1e-5  # beyond the window of 16, where the family has one


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_that_of_the_reference(family, exported, opened):
    model = exported(family)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(reference(model.quantized, torch.tensor([ids]))[0, -1].argmax()))
    assert list(opened(model.artifact).generate(PROMPT, 12, until_stop=False)) == ids[len(PROMPT) :]


def test_a_prompt_that_is_padded_at_its_left_gives_the_logits_of_its_tokens(model):
    """As openvino-genai gives batches: padding is masked, positions begin with the first token."""
    request = ov.Core().compile_model(model.artifact / "openvino_model.xml", "CPU", settings("CPU", OpenOptions(exact=True)))
    ids, mask = np.zeros((1, 30), np.int64), np.zeros((1, 30), np.int64)
    ids[0, 10:], mask[0, 10:] = IDS[0, :20].numpy(), 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": np.zeros(1, np.int32)}
    found = request.create_infer_request().infer(feeds)["logits"]
    assert off(found[0, 10:], reference(model.quantized, IDS[:1, :20])[0]) < 1e-5


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_truncating_forgets_what_came_after(model, opened, exact):
    session = opened(model.artifact, exact=exact)
    cache = session.cache(64)
    session.feed(cache, IDS[0, :40].tolist())
    cache.truncate(20)
    again = session.feed(cache, IDS[0, 20:30].tolist()).copy()
    assert off(again, session.feed(session.cache(64), IDS[0, :30].tolist())) < (1e-5 if exact else 0.1)
    cache.truncate(0)
    assert off(session.feed(cache, PROMPT).copy(), session.feed(session.cache(64), PROMPT)) < 1e-6


def test_a_conversation_goes_on_where_it_was(session):
    talk = session.conversation()
    first = list(talk.reply(PROMPT, 4))
    assert (talk.capacity, talk.length) == (128, len(PROMPT) + len(first) - (len(first) == 4))
    talk.truncate(len(PROMPT))
    assert list(talk.reply(first[:1], 3)) == list(session.generate([*PROMPT, first[0]], 3))


def test_no_more_tokens_are_taken_than_there_is_room_for(session):
    cache = session.cache(12)
    session.feed(cache, PROMPT)
    with pytest.raises(QhubError, match="`3` tokens do not fit: `10` of 12 are kept"):
        session.feed(cache, [3, 4, 5])
    assert cache.length == 10
    with pytest.raises(QhubError, match="`129` tokens do not fit the model's context of 128"):
        session.cache(129)


@pytest.mark.parametrize(("ids", "words"), [([], "no tokens"), ([128], "vocabulary of 128"), ([-1], "vocabulary of 128")], ids=str)
def test_tokens_that_the_model_does_not_have_are_refused(session, ids, words):
    with pytest.raises(QhubError, match=words):
        session.feed(session.cache(8), ids)


def test_generation_ends_at_a_stop_token_of_either_config(copy, session, opened):
    said = list(session.generate(PROMPT, 8, until_stop=False))
    for name in ("generation_config.json", "config.json"):
        config = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        (copy / name).write_text(json.dumps({**config, "eos_token_id": [127, said[3]]}))
        assert list(opened(copy).generate(PROMPT, 8)) == said[: said.index(said[3])]
        (copy / "generation_config.json").unlink(missing_ok=True)


def test_sampling_is_decided_by_its_seed(session):
    one, again, other = (list(session.generate(PROMPT, 12, temperature=5.0, seed=seed, until_stop=False)) for seed in (1, 1, 2))
    assert one == again != other
    greedy = list(session.generate(PROMPT, 12, until_stop=False))
    assert list(session.generate(PROMPT, 12, temperature=5.0, top_p=1e-9, seed=3, until_stop=False)) == greedy


def test_weights_of_a_token_are_all_matrices_but_the_embedding(session):
    quantized = 2 * (4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128)
    codes, scales, zeros = quantized // 2, quantized // 32 * 2, quantized // 64
    assert session.bytes_per_token == codes + scales + zeros + 128 * 64 * 4


# How it is opened.
def test_the_device_is_the_one_that_is_named(model):
    assert OpenVinoRuntime().open(model.artifact, OpenOptions(kernel="cpu")).logits(IDS.numpy()).shape == (3, 70, 128)
    with pytest.raises(UsageError, match="OpenVINO has no device `AVX2` here") as caught:
        OpenVinoRuntime().open(model.artifact, OpenOptions(kernel="avx2"))
    assert "CPU" in caught.value.hint


def test_exact_sessions_round_nothing_and_threads_are_those_that_were_asked_for(model, opened):
    exact, rounded = (opened(model.artifact, exact=exact, threads=2).compiled for exact in (True, False))
    assert exact.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert exact.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert exact.get_property("KV_CACHE_PRECISION") == ov.Type.f32
    assert [one.get_property("INFERENCE_NUM_THREADS") for one in (exact, rounded)] == [2, 2]
    assert rounded.get_property("NUM_STREAMS") == 1


def test_what_was_compiled_of_a_small_model_is_kept_in_the_users_cache(model, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, again = (opened(model.artifact).logits(IDS.numpy()) for _ in range(2))
    assert list((tmp_path / "qhub" / "openvino").iterdir())
    assert np.array_equal(first, again)
    assert "CACHE_DIR" not in settings("CPU", OpenOptions(), 1 << 40)


# Files that are not what they should be: one clear error each.
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path, text):
    path.write_text(path.read_text().replace(text, text.replace("Swish", "Swash").replace("down", "dawn")))


XML, BIN = "openvino_model.xml", "openvino_model.bin"
DAMAGE = {
    "the graph cut": (lambda folder: cut(folder / XML), "does not open"),
    "the graph empty": (lambda folder: (folder / XML).write_bytes(b""), "does not open"),
    "the data cut": (lambda folder: cut(folder / BIN), "does not open"),
    "the data missing": (lambda folder: (folder / BIN).unlink(), r"`openvino_model\.bin` is missing"),
    "an unknown operation": (lambda folder: without(folder / XML, 'type="Swish"'), "does not open"),
    "the config cut": (lambda folder: cut(folder / "config.json"), r"config\.json` cannot be read"),
    "the config of nothing": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "lacks or garbles"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_clear_error(copy, opened, damage, words):
    damage(copy)
    with pytest.raises(QhubError, match=words) as caught:
        opened(copy)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["model.layers.1.mlp.down_proj.codes", "model.layers.1.mlp.down_proj.zeros"])
def test_a_constant_that_is_missing_is_an_error_when_codes_are_read_back(copy, text):
    without(copy / XML, text)
    with pytest.raises(QhubError, match=rf"is damaged: it has no `{text}`"):
        OpenVinoExporter().read_layers(copy)


def test_a_folder_without_a_graph_is_refused(model, opened):
    with pytest.raises(Unsupported, match=r"has no openvino_model\.xml"):
        opened(model.quantized)


def test_a_change_in_the_file_is_seen_when_codes_are_read_back(copy):
    before = OpenVinoExporter().read_layers(copy)
    data = (copy / BIN).read_bytes()
    node = next(node for node in ov.Core().read_model(copy / XML).get_ops() if node.get_friendly_name().endswith("1.mlp.down_proj.codes"))
    place = data.index(node.get_tensor_view().data.tobytes())
    (copy / BIN).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    after = OpenVinoExporter().read_layers(copy)
    assert [name for name in before if not before[name].equals(after[name])] == ["model.layers.1.mlp.down_proj"]
