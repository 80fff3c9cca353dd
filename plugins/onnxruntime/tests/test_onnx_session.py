"""A session: generation with a cache that is written in place, conversations, and files that are damaged."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import EXPORTERS, exported, opened
from qhub_onnxruntime.open import open_graph
from qhub_onnxruntime.plugin import OnnxRuntime
from references import off, reference
from tiny_models import random_ids

from qhub import OpenOptions, QhubError, Unsupported

IDS = random_ids(3, 70)
PROMPT = IDS[0, :10].tolist()
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3"]


@pytest.fixture
def model():
    """A tiny Llama, exported."""
    return exported("llama", "w4a16-g32-asym")


@pytest.fixture
def session(model):
    """It, opened."""
    return opened(model.artifact)


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the artifact that a test may damage."""
    return shutil.copytree(model.artifact, tmp_path / "copy")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_and_token_by_token_give_the_logits_of_the_whole(family):
    model = exported(family, "w4a16-g32-asym")
    session, wanted = opened(model.artifact), reference(model.quantized, IDS[:1])[0]
    cache, ids = session.cache(80), IDS[0].tolist()
    found = [session.feed(cache, part).copy() for part in (ids[:17], ids[17:40], *([token] for token in ids[40:]))]
    assert off(found[0], wanted[16]) < 1e-5
    assert off(np.stack(found[1:]), wanted[39:]) < 1e-5  # beyond the window of 16, where the family has one


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_that_of_the_reference(family):
    model = exported(family, "w4a16-g32-asym")
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(reference(model.quantized, torch_ids(ids))[0, -1].argmax()))
    assert list(opened(model.artifact).generate(PROMPT, 12, until_stop=False)) == ids[len(PROMPT) :]


def torch_ids(ids):
    import torch

    return torch.tensor([ids])


def test_a_cache_is_written_where_it_lies(session):
    cache = session.cache(32)
    session.feed(cache, PROMPT)
    before = [array.copy() for array in cache._arrays]
    session.feed(cache, [5])
    for array, old in zip(cache._arrays, before, strict=True):
        assert np.array_equal(array[:, :, :10], old[:, :, :10])
        assert array[:, :, 10].any()
        assert not array[:, :, 11:].any()


def test_truncating_forgets_what_came_after(session):
    cache = session.cache(64)
    session.feed(cache, IDS[0, :40].tolist())
    cache.truncate(20)
    again = session.feed(cache, IDS[0, 20:30].tolist()).copy()
    assert off(again, session.feed(session.cache(64), IDS[0, :30].tolist())) < 1e-5


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


def test_generation_ends_at_a_stop_token_of_either_config(copy, session):
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
    codes, scales, zeros = quantized // 2, quantized // 32 * 4, quantized // 64
    assert session.bytes_per_token == codes + scales + zeros + 128 * 64 * 4


def test_a_kernel_cannot_be_chosen(model):
    with pytest.raises(Unsupported, match="`onnxruntime` has no kernel `avx2`"):
        OnnxRuntime().open(model.artifact, OpenOptions(kernel="avx2"))


def test_threads_are_those_that_were_asked_for_and_do_not_spin(model):
    graph = open_graph(model.artifact, OpenOptions(threads=3))
    options = graph.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert graph.get_providers() == ["CPUExecutionProvider"]


def test_anybody_opens_the_file_without_knowing_of_the_extra_input(model):
    """As onnxruntime-genai does: plain inputs, logits of every token."""
    graph = onnxruntime.InferenceSession(model.artifact / "model.onnx", providers=["CPUExecutionProvider"])
    assert "logits_from" not in [put.name for put in graph.get_inputs()]
    feeds = {put.name: np.zeros((3, 2, 0, 16), np.float32) for put in graph.get_inputs() if put.name.startswith("past")}
    found = graph.run(["logits"], {**feeds, "input_ids": IDS.numpy(), "attention_mask": np.ones((3, 70), np.int64)})[0]
    assert off(found, opened(model.artifact, exact=False).logits(IDS.numpy())) < 1e-6


def test_onnxruntime_genai_opens_the_folder_and_says_the_same(model):
    genai = pytest.importorskip("onnxruntime_genai")
    engine = genai.Model(str(model.artifact))
    parameters = genai.GeneratorParams(engine)
    parameters.set_search_options(max_length=len(PROMPT) + 12, do_sample=False)
    generator = genai.Generator(engine, parameters)
    generator.append_tokens(PROMPT)
    said = []
    while not generator.is_done():
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    assert said == list(opened(model.artifact, exact=False).generate(PROMPT, 12))


# Files that are not what they should be: one clear error each.
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(path):
    model = onnx.load_model(path, load_external_data=False)
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.endswith("0.mlp.up_proj.codes")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save_model(model, path)


def of_the_future(path):
    model = onnx.load_model(path, load_external_data=False)
    model.opset_import[0].version = 999
    onnx.save_model(model, path)


DAMAGE = {
    "the graph cut": (lambda folder: cut(folder / "model.onnx"), "does not open"),
    "the graph empty": (lambda folder: (folder / "model.onnx").write_bytes(b""), "does not open"),
    "the data cut": (lambda folder: cut(folder / "model.onnx.data"), "does not open"),
    "the data missing": (lambda folder: (folder / "model.onnx.data").unlink(), r"`model\.onnx\.data` is missing"),
    "a weight missing": (lambda folder: without_a_weight(folder / "model.onnx"), r"model\.layers\.0\.mlp\.up_proj"),
    "an unknown opset": (lambda folder: of_the_future(folder / "model.onnx"), "999"),
    "the config cut": (lambda folder: cut(folder / "config.json"), r"config\.json` cannot be read"),
    "the config of nothing": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "lacks or garbles"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_clear_error(copy, damage, words):
    damage(copy)
    with pytest.raises(QhubError, match=words) as caught:
        opened(copy)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["the graph cut", "the data cut", "the data missing", "a weight missing"])
def test_damage_is_an_error_when_codes_are_read_back_too(copy, name):
    DAMAGE[name][0](copy)
    with pytest.raises(QhubError, match=r"model\.onnx` is damaged"):
        EXPORTERS[0].read_layers(copy)


def test_a_folder_without_a_graph_is_refused(model):
    with pytest.raises(Unsupported, match=r"has no model\.onnx"):
        opened(model.quantized)


def test_a_change_in_the_file_is_seen_when_codes_are_read_back(copy):
    before = EXPORTERS[0].read_layers(copy)
    file = onnx.load_model(copy / "model.onnx", load_external_data=False)
    (codes,) = [tensor for tensor in file.graph.initializer if tensor.name == "model.layers.1.mlp.down_proj.codes"]
    place = {entry.key: entry.value for entry in codes.external_data}
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[int(place["offset"])] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    after = EXPORTERS[0].read_layers(copy)
    assert [name for name in before if not before[name].equals(after[name])] == ["model.layers.1.mlp.down_proj"]
