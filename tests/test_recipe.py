"""A recipe survives YAML, its digest changes with what determines the bytes, and wrong ones are refused by key."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from qhub.errors import UsageError
from qhub.route import recipe as recipes
from qhub.route.recipe import Choices, digest, file_sha256, folder_sha256, from_yaml, make_recipe, to_yaml
from qhub.types import Calibration, Goals, ModelSource, Recipe, Route

FULL = Recipe(
    model="demo:llm",
    model_path="/models/demo",
    model_sha256="ab" * 32,
    target="apple-m1",
    method="awq+gptq",
    scheme="w4a16-g32-asym",
    exporter="hf",
    runtime="hf",
    calibration=Calibration("calib.txt", "cd" * 32, samples=16, seq_len=256),
    evaluation=Calibration("eval.txt", samples=8),
    overrides={"model.layers.0.*": "w8a16", "lm_head": "float"},
    options={"awq": {"grid": 20, "clip": True}, "gptq": {"damping": 0.01}},
    seed=7,
    goals=Goals(max_drop_pct=1.5, max_size_bytes=10**9, retrain=True),
    versions={"qhub-core": "0.1.0", "python": "3.11.7"},
    hardware={"cpu": "a processor", "isa": "avx2 fma", "threads": "8", "os": "Linux-6.1", "accelerators": "none"},
)
MINIMAL = Recipe("m", "m", "", "host", "rtn", "w8a16")


@pytest.mark.parametrize("recipe", [FULL, MINIMAL], ids=["full", "minimal"])
def test_a_recipe_survives_yaml(recipe):
    assert from_yaml(to_yaml(recipe)) == recipe
    assert to_yaml(from_yaml(to_yaml(recipe))) == to_yaml(recipe)


def test_yaml_is_in_the_order_a_person_reads():
    keys = [line.split(":")[0] for line in to_yaml(FULL).splitlines() if not line.startswith(" ")]
    assert keys == [field.name for field in dataclasses.fields(Recipe)]


def test_a_shorthand_scheme_is_written_in_full():
    text = to_yaml(MINIMAL).replace("w8a16", "w4-g128")
    assert from_yaml(text).scheme == "w4a16-g128-asym"


# What the bytes of the result depend on …
@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "00" * 32},
        {"method": "awq"},
        {"scheme": "w4a16-g64-asym"},
        {"calibration": Calibration("calib.txt", "ef" * 32, samples=16, seq_len=256)},
        {"calibration": Calibration("calib.txt", "cd" * 32, samples=17, seq_len=256)},
        {"calibration": None},
        {"overrides": {}},
        {"options": {"awq": {"grid": 21, "clip": True}, "gptq": {"damping": 0.01}}},
        {"seed": 8},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_determines_the_bytes(change):
    assert digest(dataclasses.replace(FULL, **change)) != digest(FULL)


# … and what they do not.
@pytest.mark.parametrize(
    "change",
    [
        {"model": "other name"},
        {"model_path": "/elsewhere"},
        {"versions": {}},
        {"hardware": {}},
        {"goals": Goals()},
        {"exporter": None},
        {"target": "host"},
        {"evaluation": None},
        {"calibration": Calibration("/elsewhere/calib.txt", "cd" * 32, samples=16, seq_len=256)},
    ],
    ids=str,
)
def test_the_digest_does_not_change_with_the_rest(change):
    assert digest(dataclasses.replace(FULL, **change)) == digest(FULL)


def test_the_digest_survives_yaml_and_is_a_sha256():
    assert digest(from_yaml(to_yaml(FULL))) == digest(FULL)
    assert len(digest(FULL)) == 64


# One thing wrong at a time: the error names the key.
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 7", "sead: 7", "`recipe` has the unknown key `sead`"),
        ("seed: 7", "seed: many", "`recipe.seed` is `many`, which is not a number from 0 up"),
        ("seed: 7", "seed: -1", "`recipe.seed` is `-1`"),
        ("seed: 7", "seed: true", "`recipe.seed` is `True`"),
        ("scheme: w4a16-g32-asym", "scheme: w4a16-g33-asym", "scheme `w4a16-g33-asym` has group size `33`"),
        ("scheme: w4a16-g32-asym", "scheme: 4", "`recipe.scheme` is `4`, which is not a text"),
        ("method: awq+gptq\n", "", "the recipe has no `method`"),
        ("  samples: 16", "  sample: 16", "`recipe.calibration` has the unknown key `sample`"),
        ("  data: calib.txt\n", "", "`recipe.calibration` has no `data`"),
        ("  lm_head: float", "  lm_head: fp99", "unknown scheme `fp99`"),
        ("  max_drop_pct: 1.5", "  max_drop_pct: little", "`recipe.goals.max_drop_pct` is `little`"),
        ("  retrain: true", "  retrain: maybe", "`recipe.goals.retrain` is `maybe`, which is not `true` or `false`"),
        ("  awq:\n    grid: 20\n    clip: true", "  awq: fast", "`recipe.options.awq` is `fast`, which is not a mapping"),
        ("  threads: '8'", "  threads: 8", "`recipe.hardware.threads` is `8`, which is not a text"),
        ("model: demo:llm", "model: [", "the recipe is not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_key(old, new, message):
    text = to_yaml(FULL)
    assert old in text
    with pytest.raises(UsageError) as caught:
        from_yaml(text.replace(old, new))
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "- a", "3", "!!python/object/apply:os.system [ls]"])
def test_what_is_no_recipe_at_all_is_refused(text):
    with pytest.raises(UsageError):
        from_yaml(text)


def test_making_a_recipe_fills_in_hash_and_versions(llama):
    folder = llama()
    source = ModelSource("llama", folder, "a toy")
    route = Route("host", "rtn", "weight-only", "w4a16-g32-asym", "rtn", None, None)
    choices = Choices(
        calibration=Calibration("c.txt"), overrides={"a": "float"}, options={"rtn": {"x": 1}}, seed=3, distributions=("pytest",)
    )
    made = make_recipe(source, route, Goals(), choices)
    assert (made.model, made.model_path, made.target, made.method, made.scheme) == ("llama", str(folder), "host", "rtn", "w4a16-g32-asym")
    assert made.model_sha256 == folder_sha256(folder)
    assert (made.seed, made.overrides, made.options) == (3, {"a": "float"}, {"rtn": {"x": 1}})
    assert {"python", "numpy", "pytest"} <= set(made.versions)
    assert set(made.hardware) == {"cpu", "isa", "threads", "os", "accelerators"}
    assert from_yaml(to_yaml(made)) == made
    assert make_recipe(source, route, Goals()).calibration is None


def test_the_hash_of_a_folder_follows_content_not_place(llama):
    first, second = llama(name="first"), llama(name="second")
    assert folder_sha256(first) == folder_sha256(second)
    (second / "README.md").write_text("not part of the model", encoding="utf-8")
    assert folder_sha256(first) == folder_sha256(second)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = folder_sha256(second)
        with (second / name).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        assert folder_sha256(second) != before, name


def test_the_hash_of_a_folder_sees_every_piece(monkeypatch, llama):
    monkeypatch.setattr(recipes, "_PIECE_BYTES", 1000)
    folder = llama()
    before = folder_sha256(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(12345)
        file.write(b"\x01")
    assert folder_sha256(folder) != before


def test_the_hash_of_a_file_is_what_sha256sum_prints(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5_000_000)
    assert file_sha256(path) == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
