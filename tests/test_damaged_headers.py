"""Damaged model files and configs: each gives one error of ours or a profile, never another exception, and never much memory."""

from __future__ import annotations

import copy
import json
import random
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import model_files as made
import pytest

from qhub.errors import QhubError
from qhub.plugins import Plugins
from qhub.route.profile import profile

PLUGINS = Plugins.load([])
CONFIGS = Path(__file__).parent / "configs"
WRITERS = {"gguf": made.llama_gguf, "onnx": made.cnn_onnx, "tflite": made.cnn_tflite, "pt2": made.cnn_pt2}
MEMORY_BYTES = 64 << 20
SECONDS = 5


@pytest.fixture(params=WRITERS)
def valid(request, tmp_path):
    """A valid small file of each format."""
    return WRITERS[request.param](tmp_path / f"valid.{request.param}")


def outcome(path):
    """ "profile", or the message of our error; anything else fails the test."""
    try:
        found = profile(str(path), PLUGINS)
    except QhubError as error:
        return error.message if error.hint else "an error without a hint"
    assert found.parameters >= 0
    assert found.weight_bytes >= 0
    json.dumps(found.source)
    return "profile"


def outcomes(valid, contents):
    """What comes of each of `contents` in place of `valid`, within little memory and time."""
    found, started = [], time.process_time()
    tracemalloc.start()
    for content in contents:
        valid.write_bytes(content)
        found.append(outcome(valid))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_BYTES
    assert time.process_time() - started < SECONDS * 4
    return found


def test_a_file_that_was_cut_off_is_named(valid):
    whole = valid.read_bytes()
    cut = [whole[: len(whole) * part // 50] for part in range(50)]
    found = outcomes(valid, cut)
    assert all(message.startswith(f"`{valid}` is not a valid ") for message in found)
    assert outcomes(valid, [whole]) == ["profile"]


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_never_surprise(valid, seed):
    whole, chance = valid.read_bytes(), random.Random(seed)
    span = min(len(whole), 3000)  # where the headers are; the data behind them is not read

    def flipped():
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(span)] = chance.randrange(256)
        return bytes(content)

    outcomes(valid, (flipped() for _ in range(150)))


# Every place of a header may be a length: none is believed.
@pytest.mark.parametrize("lie", [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 1 << 20], ids=hex)
def test_numbers_that_lie_are_not_believed(valid, lie):
    whole = valid.read_bytes()
    step = max(1, min(len(whole), 3000) // 150)

    def lying():
        for place in range(0, min(len(whole), 3000) - 8, step):
            yield whole[:place] + struct.pack("<I", lie) + whole[place + 4 :]
            yield whole[:place] + struct.pack("<Q", lie << 32 | lie) + whole[place + 8 :]

    outcomes(valid, lying())


def test_files_full_of_chance_never_surprise(valid):
    chance, start = random.Random(7), valid.read_bytes()[:64]
    outcomes(valid, [start + chance.randbytes(chance.randrange(2000)) for _ in range(200)])


# Numbers that a header gives and no file could hold.
@pytest.mark.parametrize(
    ("tensors", "values"), [(1 << 60, 0), (0, 1 << 60), (1 << 63, 1 << 63), (1000, 1)], ids=["tensors", "values", "both", "a few too many"]
)
def test_a_gguf_that_claims_more_than_it_holds(tmp_path, tensors, values):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + bytes(100))
    assert "(truncated?)" in outcome(path)


def test_a_gguf_with_lists_in_lists_in_lists(tmp_path):
    path = tmp_path / "m.gguf"
    nested = struct.pack("<IQ", 9, 1) * 5000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + made.gguf_text("deep") + struct.pack("<I", 9) + nested)
    assert "the list `deep` has unknown type `9`" in outcome(path)


@pytest.mark.parametrize(("version", "why"), [(1, "version `1`"), (0x03000000, "or big-endian")])
def test_a_gguf_of_another_version(tmp_path, version, why):
    assert why in outcome(made.gguf(tmp_path / "m.gguf", {}, {}, version=version))


def test_onnx_graphs_within_graphs_end_somewhere(tmp_path):
    graph = b""
    for _ in range(200):
        node = made.field(4, "If") + made.field(5, made.field(1, "then_branch") + made.field(6, graph))
        graph = made.field(1, node)
    (tmp_path / "m.onnx").write_bytes(made.field(7, graph))
    assert "graphs lie within graphs" in outcome(tmp_path / "m.onnx")


def test_an_onnx_tensor_without_the_data_that_its_shape_needs(tmp_path):
    empty = made.onnx_tensor("w", (1 << 40, 1 << 20), data=b"")
    assert f"needs {1 << 62} bytes but has `0`" in outcome(made.onnx(tmp_path / "m.onnx", [], [empty]))
    nothing = made.field(1, 1 << 30) + made.field(2, 1) + made.field(8, "w")
    assert "has no data for that" in outcome(made.onnx(tmp_path / "n.onnx", [], [nothing]))


def test_a_flatbuffer_that_refers_to_itself_ends_somewhere(tmp_path):
    path = made.cnn_tflite(tmp_path / "m.tflite")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 0, 0)  # the root is the header itself
    path.write_bytes(content)
    assert "is not a valid TFLite file" in outcome(path)


def test_a_pt2_whose_program_is_a_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("net/models/model.json", "w") as file:
        for _ in range(260):
            file.write(bytes(1 << 20))
    started = time.process_time()
    assert f"its program claims `{260 << 20}` bytes" in outcome(tmp_path / "m.pt2")
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize(
    "program", ["", "{", "[]", "{}", "[" * 100_000, '{"graph_module": 1}', '{"graph_module": {"graph": []}}'], ids=lambda text: text[:30]
)
def test_a_pt2_whose_program_is_none(tmp_path, program):
    assert "is not a valid PT2 file" in outcome(made.pt2(tmp_path / "m.pt2", program))


@pytest.mark.parametrize("seed", range(4))
def test_programs_with_odd_values_never_surprise(tmp_path, seed):
    chance = random.Random(seed)
    base = made.pt2_program({"conv.weight": (8, 3, 3, 3), "fc.weight": (4, 4)}, {"x": (1, 3, 8, 8)}, ("torch.ops.aten.relu.default",))
    for _ in range(100):
        program = json.loads(json.dumps(base))
        spoil(program, chance)
        outcome(made.pt2(tmp_path / "m.pt2", program))


ODD = (None, -1, 0, 1 << 70, 2.5, "x", "", True, [], [1], {}, {"a": 1}, [[]], 1e308, "9" * 5000)


def spoil(value, chance):
    """Replace or remove something somewhere in a JSON document."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.8:
            value = inner
            continue
        if chance.random() < 0.2:
            del value[key]
        else:
            value[key] = copy.deepcopy(chance.choice(ODD))
        return


@pytest.mark.parametrize("name", [path.name for path in sorted(CONFIGS.iterdir())])
def test_configs_with_odd_values_never_surprise(tmp_path, name):
    chance = random.Random(name)
    config = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    for _ in range(120):
        spoiled = json.loads(json.dumps(config))
        for _ in range(chance.choice((1, 1, 3))):
            spoil(spoiled, chance)
        (tmp_path / "config.json").write_text(json.dumps(spoiled), encoding="utf-8")
        outcome(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 1 << 40), ("num_hidden_layers", 10**6), ("hidden_size", 1 << 60), ("vocab_size", -1), ("hidden_size", "big")],
)
def test_a_config_of_a_model_that_cannot_be_is_refused(tmp_path, key, value):
    config = json.loads((CONFIGS / "llama-3-8b" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    assert outcome(tmp_path) == f"`config.json` says that `{key}` is `{value}`, which no model has"


def test_a_config_of_too_many_tensors_is_refused(tmp_path):
    config = json.loads((CONFIGS / "llama-3-8b" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4096, "num_hidden_layers": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "means more than `200000` tensors" in outcome(tmp_path)


# A section that says how weights are stored, and says something else than it should.
@pytest.mark.parametrize(
    "section",
    [
        True, 1.5, [], "awq", {"bits": "four"}, {"bits": True}, {"bits": -4}, {"bits": 4, "quant_method": ["awq"]}, {"config_groups": 3},
        {"config_groups": {"g": {"weights": {"num_bits": 4}, "targets": 7}}}, {"config_groups": {"g": {"weights": 4}}},
        {"config_groups": {"g": {"weights": {"num_bits": 4, "block_structure": "1x32"}}}},
        {"config_groups": {"g": {"weights": {"num_bits": 4, "block_structure": [1, []], "group_size": {}}}}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_quantization_sections_never_surprise(model_folder, section):
    shapes = {"h.0.a.weight_packed": ("I32", (4, 4)), "h.0.a.weight_scale": (4, 1), "h.0.b.qweight": ("I32", (4, 4))}
    assert outcome(model_folder({"architectures": ["X"], "quantization_config": section}, shapes)) == "profile"
