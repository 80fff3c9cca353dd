"""A run that is repeated is the same, or what differs is named: source, data, recipe, versions, hardware, files, layers, metrics."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from forked import needs_plugins
from safetensors.torch import load_file, save_file
from test_pipeline import ARTIFACT, loaded
from tiny_models import random_ids, tiny_model

from qhub import pipeline, reproduce
from qhub.cli.reproduce import verdict
from qhub.errors import QhubError, UsageError
from qhub.events import Events
from qhub.pipeline import RunRequest
from qhub.prove.report import load
from qhub.route.recipe import from_yaml, to_yaml
from qhub.types import Difference

pytestmark = needs_plugins
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plugins():
    return loaded("gptq", "hf", "rtn")


@pytest.fixture(scope="module")
def original(tmp_path_factory, plugins):
    """A folder with a model, a calibration text, an evaluation text and a finished run of them."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(tiny_model("llama"), folder / "model")
    for name, seed in (("calib", 0), ("eval", 1)):
        text = "".join(map(chr, (random_ids(60, 64, seed) % 95 + 32).flatten().tolist()))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    texts = {"calib": str(folder / "calib.txt"), "eval": str(folder / "eval.txt")}
    settings = {"plugins": ("gptq", "hf"), "scheme": "w4a16-g32-asym", "samples": 8, "seq_len": 64, "device": "cpu"}
    plan = pipeline.plan(RunRequest(model=str(folder / "model"), out=folder / "run", **texts, **settings), plugins)
    pipeline.run(plan, plugins, Events())
    return folder


@pytest.fixture
def here(original, tmp_path):
    """The same in a place of its own, whose recipe says so; tests may change it."""
    shutil.copytree(original, tmp_path / "here")
    path = tmp_path / "here" / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(original), str(tmp_path / "here")))
    return tmp_path / "here"


def change_recipe(here: Path, **changes: object) -> None:
    path = here / "run" / "recipe.yaml"
    path.write_text(to_yaml(replace(from_yaml(path.read_text()), **changes)))


def repeated(here: Path, plugins, **request: object) -> reproduce.Reproduction:
    repeat = reproduce.plan(here / "run", RunRequest(**request), plugins)
    return reproduce.carry_out(repeat, plugins, Events())


def test_a_run_that_is_repeated_is_the_same_in_every_file_tensor_and_metric(here, plugins):
    found = repeated(here, plugins)
    assert (found.same, found.differences, found.layers, found.circumstances) == (True, (), (), ())
    assert found.repeat == str(here / "run-repeat")
    files = sum(path.is_file() for path in (here / "run" / "quantized").iterdir())
    assert found.compared == {"files": files, "tensors": 2 * 9 + 3, "metrics": 21}
    assert verdict(found) == f"same: {files} files, 21 tensors, 21 metrics"
    assert json.loads((here / "run-repeat" / reproduce.FILE).read_text())["same"] is True
    assert load(here / "run-repeat").quantized == load(here / "run").quantized


def test_each_repeat_is_a_fresh_one(here, plugins):
    first, second = repeated(here, plugins), repeated(here, plugins)
    assert [Path(found.repeat).name for found in (first, second)] == ["run-repeat", "run-repeat-2"]
    assert second.same


def test_the_run_that_is_repeated_is_left_as_it_is(here, plugins):
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    repeated(here, plugins, out=here / "elsewhere")
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


# What it starts from is not the same: that is the answer, and nothing is repeated.


def test_one_changed_byte_of_the_source_is_named(here, plugins):
    path = here / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = repeated(here, plugins)
    (difference,) = found.differences
    assert (found.same, found.repeat, difference.kind, difference.name) == (False, None, "source", str(here / "model"))
    assert difference.recorded != difference.found
    assert not (here / "run-repeat").exists()
    assert verdict(found) == "differs: 1 source; nothing was repeated, since it would start from something else"


def test_all_inputs_that_changed_are_named_at_once(here, plugins):
    (here / "model" / "config.json").write_text((here / "model" / "config.json").read_text() + " ")
    for name in ("calib.txt", "eval.txt"):
        (here / name).write_text((here / name).read_text() + "more")
    found = repeated(here, plugins)
    assert [(item.kind, Path(item.name).name) for item in found.differences] == [
        ("source", "model"), ("data", "calib.txt"), ("data", "eval.txt")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gone", "error", "hint"),
    [
        ("model", "the model of `{here}/run` is no longer at `{here}/model`", "say where it is: `qhub reproduce {here}/run --model MODEL`"),
        ("calib.txt", "data file `{here}/calib.txt` does not exist", "say where it is: `--calib TEXT`"),
        ("eval.txt", "data file `{here}/eval.txt` does not exist", "say where it is: `--eval TEXT`"),
        ("run/report.json", "`{here}/run` has no report.json", "finish it: `qhub run --resume --out {here}/run`"),
    ],
)
def test_what_is_gone_is_an_error_that_says_how_to_go_on(here, plugins, gone, error, hint):
    (here / gone).rename(here / "moved")
    with pytest.raises(QhubError) as caught:
        repeated(here, plugins)
    assert caught.value.message.startswith(error.format(here=here))
    assert caught.value.hint == hint.format(here=here)


def test_what_moved_is_taken_from_where_the_user_says(here, plugins):
    for name in ("model", "calib.txt", "eval.txt"):
        (here / name).rename(here / f"moved-{name}")
    places = {"model": "moved-model", "calib": "moved-calib.txt", "eval": "moved-eval.txt"}
    assert repeated(here, plugins, **{option: str(here / name) for option, name in places.items()}).same


# The recipe is not the same


def test_a_recipe_that_was_edited_is_named_with_all_that_follows(here, plugins):
    change_recipe(here, seed=5)
    found = repeated(here, plugins)
    kinds = [difference.kind for difference in found.differences]
    assert kinds[0] == "recipe"
    assert {"file", "artifact", "metric"} <= set(kinds)
    assert {row.part for row in found.layers} >= {"codes"}
    assert all(0 < row.different <= row.count for row in found.layers)
    assert not found.same
    assert "1 recipe" in verdict(found)
    assert verdict(found).endswith("versions and hardware are as recorded")


# Versions and hardware are not the same: no fault in themselves.


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({"versions": {"numpy": "1.0"}}, {("version", "numpy")}, "versions are not as recorded"),
        ({"hardware": {"cpu": "an abacus", "threads": "900"}}, {("hardware", "cpu"), ("hardware", "threads")}, "the hardware is not as"),
    ],
    ids=["a version", "the hardware"],
)
def test_other_circumstances_with_the_same_bytes_are_noted_and_the_same(here, plugins, changes, expected, said):
    change_recipe(here, **changes)
    found = repeated(here, plugins)
    assert found.same
    assert {(item.kind, item.name) for item in found.circumstances} == expected
    assert said in verdict(found)
    assert verdict(found).endswith("which made no difference")


# The result is not the same


def spoil(run: Path, name: str, count: int) -> str:
    """Other values at the beginning of tensor `name` in the quantized model; returns its file."""
    index = json.loads((run / "quantized" / "model.safetensors.index.json").read_text())
    path = run / "quantized" / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1)[:count] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def test_layers_whose_codes_differ_are_named_with_their_number(here, plugins):
    file = spoil(here / "run", f"{UP}.weight_packed", 3)  # the lowest bit of a word: of one code
    change_recipe(here, versions={"numpy": "1.0"})
    found = repeated(here, plugins)
    assert [(item.kind, item.name) for item in found.differences] == [("file", f"quantized/{file}")]
    assert found.layers == (reproduce.TensorDifference(UP, "codes", 128 * 64, 3),)
    assert verdict(found) == "differs: 1 file, 1 layer; versions are not as recorded, which may be why"


def test_a_file_that_is_gone_or_cut_is_named(here, plugins):
    (here / "run" / "quantized" / "tokenizer.json").unlink()
    shard = sorted((here / "run" / "quantized").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    found = repeated(here, plugins)
    assert {item.name for item in found.differences} == {f"quantized/{shard.name}", "quantized/tokenizer.json"}
    absent = next(item for item in found.differences if item.name.endswith("tokenizer.json"))
    assert (absent.recorded, len(absent.found)) == ("absent", 64)
    assert (found.layers, found.compared["tensors"]) == ((), 0)


def test_a_layer_whose_parts_do_not_fit_together_is_named(here, plugins):
    path = here / "run" / "quantized" / spoil(here / "run", f"{UP}.weight_packed", 1)
    tensors = load_file(path)
    tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight_packed"].flatten()
    save_file(tensors, path, metadata={"format": "pt"})
    assert repeated(here, plugins).layers == (reproduce.TensorDifference(UP, reproduce.UNREADABLE, 0, 0),)


def test_numbers_of_a_float_tensor_that_differ_are_counted(here, plugins):
    path = here / "run" / "quantized" / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert repeated(here, plugins).layers == (reproduce.TensorDifference("model.norm", "float", 64, 5),)


def test_of_a_json_file_the_keys_that_differ_are_named(here, plugins):
    path = here / "run" / "quantized" / "qhub.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": {"x": "y"}, "extra": 1}))
    (difference,) = repeated(here, plugins).differences
    assert (difference.name, difference.part) == ("quantized/qhub.json", "notes, extra")


def test_an_artifact_that_was_changed_after_the_run_is_damage(here, plugins):
    with (here / "run" / ARTIFACT / "config.json").open("a") as file:
        file.write(" ")
    (difference,) = repeated(here, plugins).differences
    assert (difference.kind, difference.name) == ("damage", ARTIFACT)


def test_metrics_that_differ_are_named_with_both_values(here, plugins):
    report = load(here / "run")
    replace(report, quantized=replace(report.quantized, kl=0.125, accuracy=float("nan"))).save(here / "run")
    found = repeated(here, plugins)
    assert [item.name for item in found.differences] == ["quantized.accuracy", "quantized.kl"]
    assert found.differences[1] == Difference("metric", "quantized.kl", "0.125", repr(report.quantized.kl))


# Where the repeat goes


def test_a_repeat_that_was_interrupted_is_continued(here, plugins):
    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "stage" and (event["name"], event["state"]) == ("export", "end"):
            raise Stop

    with pytest.raises(Stop):
        reproduce.carry_out(reproduce.plan(here / "run", RunRequest(), plugins), plugins, Events(listener=stop))
    seen = []
    repeat = reproduce.plan(here / "run", RunRequest(), plugins)
    assert (repeat.resume, repeat.plan.out.name) == (True, "run-repeat")
    found = reproduce.carry_out(repeat, plugins, Events(listener=seen.append))
    assert found.same
    assert [event["name"] for event in seen if event["event"] == "stage" and event["state"] == "start"][-1] == "compare"
    assert "quantize" not in [event.get("name") for event in seen]


@pytest.mark.parametrize("asked", ["run", "repeat", "full"])
def test_a_directory_that_is_in_use_is_refused(here, plugins, asked):
    (here / "repeat").mkdir()
    (here / "repeat" / reproduce.FILE).touch()
    (here / "full").mkdir()
    (here / "full" / "note.txt").touch()
    message = {"run": "is the run itself", "repeat": "already holds a repeat", "full": "is not empty and not a run"}[asked]
    with pytest.raises(UsageError, match=message):
        reproduce.plan(here / "run", RunRequest(out=here / asked), plugins)


def test_a_run_is_named_from_within(here, plugins, monkeypatch):
    monkeypatch.chdir(here / "run")
    assert reproduce.plan(Path(), RunRequest(), plugins).plan.out == here / "run-repeat"


def test_code_of_the_model_is_trusted_only_when_the_user_says_so_now(here, plugins):
    path = here / "run" / "state.json"
    state = json.loads(path.read_text())
    state["settings"]["trust_remote_code"] = True
    path.write_text(json.dumps(state))
    assert reproduce.plan(here / "run", RunRequest(), plugins).plan.settings.trust_remote_code is False
    assert reproduce.plan(here / "run", RunRequest(trust_remote_code=True), plugins).plan.settings.trust_remote_code is True


def test_a_device_that_the_user_chooses_now_is_a_circumstance(here, plugins):
    path = here / "run" / "state.json"
    path.write_text(path.read_text().replace('"cpu"', '"cuda"'))
    repeat = reproduce.plan(here / "run", RunRequest(device="cpu"), plugins)
    assert repeat.circumstances == (Difference("hardware", "device", "cuda", "cpu"),)
    path.unlink()
    assert reproduce.plan(here / "run", RunRequest(), plugins).circumstances == ()
