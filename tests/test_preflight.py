"""What a run is expected to take, and which runs are the same (what is refused, through the command: test_bad_input.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qhub import preflight
from qhub.errors import QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.profile import profile
from qhub.route.recipe import to_yaml
from qhub.types import Calibration, ModelSource, Recipe, last_match

TEXT = Calibration("/texts/a.txt", "abc", 64, 512)
RECIPE = Recipe("m", "/models/m", "123", "host", "gptq", "w4a16-g32-asym", exporter="hf", runtime="hf", calibration=TEXT, evaluation=TEXT)


@pytest.fixture
def large(llama):
    """The shapes of a model of 1.1 B parameters."""
    folder = llama(hidden=2048, ffn=5632, blocks=22, vocab=32000, tied=False)
    return profile(ModelSource("large", folder, ""), Plugins.load([]))


def test_a_method_without_data_takes_less_memory_and_disk(large):
    with_data, without = preflight.estimate(large, RECIPE), preflight.estimate(large, replace(RECIPE, calibration=None))
    assert with_data["weight_bytes"] == without["weight_bytes"]
    assert with_data["peak_bytes"] > without["peak_bytes"] > 500_000_000
    assert with_data["disk_bytes"] > without["disk_bytes"] == 2 * without["weight_bytes"]


def test_overrides_count_in_the_size(large):
    def size(**overrides: str) -> int:
        return preflight.estimate(large, replace(RECIPE, overrides=overrides))["weight_bytes"]

    down = 22 * 2048 * 5632
    assert size(down_proj="float") - size() == pytest.approx(down * (16 - 4.625) / 8, rel=0.01)
    assert size(down_proj="w8a16") - size() == pytest.approx(down * (8 - 4.625) / 8, rel=0.01)
    assert size(nothing="float") == size()


def test_within_a_bound_less_is_kept_in_memory_and_more_on_disk(large):
    free, bound = preflight.estimate(large, RECIPE), preflight.estimate(large, RECIPE, 2_000_000_000)
    assert bound["peak_bytes"] < free["peak_bytes"]
    assert bound["disk_bytes"] > free["disk_bytes"]


def test_the_bound_that_the_hint_names_is_enough(large):
    needed = preflight.estimate(large, RECIPE, 100_000_000)["peak_bytes"]
    with pytest.raises(QhubError) as error:
        preflight.check_memory(large, RECIPE, needed, 100_000_000)
    enough = int(float(error.value.hint.split()[1].strip("`")) * 1e9)
    preflight.check_memory(large, RECIPE, preflight.estimate(large, RECIPE, enough)["peak_bytes"], enough)
    less = enough - 100_000_000
    needed = preflight.estimate(large, RECIPE, less)["peak_bytes"]
    with pytest.raises(QhubError):
        preflight.check_memory(large, RECIPE, needed, less)


def test_without_a_bound_nothing_is_too_much(large):
    preflight.check_memory(large, RECIPE, 10**15, None)


# Which pattern means a layer: the end of its name, or all of it with wildcards; the last one that does.
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["down_proj"], "down_proj"),
        (["mlp.down_proj"], "mlp.down_proj"),
        (["own_proj"], None),
        (["down_proj.weight"], None),
        (["model.layers.0.*"], "model.layers.0.*"),
        (["model.layers.1.*"], None),
        (["*"], "*"),
        (["*", "down_proj", "up_proj"], "down_proj"),
        ([], None),
    ],
)
def test_the_last_pattern_that_means_a_layer_decides(patterns, expected):
    assert last_match("model.layers.0.mlp.down_proj", patterns) == expected


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"versions": {"torch": "9"}}, True),
        ({"hardware": {"cpu": "another"}}, True),
        ({"model": "n", "model_path": "/elsewhere/m"}, True),
        ({"calibration": replace(TEXT, data="/elsewhere/a.txt")}, True),
        ({"calibration": replace(TEXT, data_sha256="abd")}, False),
        ({"calibration": replace(TEXT, samples=65)}, False),
        ({"evaluation": None}, False),
        ({"model_sha256": "124"}, False),
        ({"target": "apple-m1"}, False),
        ({"scheme": "w8a16"}, False),
        ({"seed": 1}, False),
        ({"overrides": {"down_proj": "float"}}, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "same" if value else "another",
)
def test_a_run_is_the_same_wherever_its_files_lie(tmp_path, change, same):
    (tmp_path / "recipe.yaml").write_text(to_yaml(RECIPE), encoding="utf-8")
    assert preflight.same_recipe(tmp_path, replace(RECIPE, **change)) is same


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"model: ["], ids=["none", "empty", "no text", "no YAML"])
def test_what_is_no_recipe_is_not_the_same(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.yaml").write_bytes(content)
    assert preflight.same_recipe(tmp_path, RECIPE) is False


def test_an_empty_or_absent_directory_is_free_and_a_half_made_run_too(tmp_path):
    preflight.check_out(tmp_path, RECIPE, resume=False)
    preflight.check_out(tmp_path / "absent", RECIPE, resume=False)
    (tmp_path / "recipe.yaml.partial").touch()
    preflight.check_out(tmp_path, RECIPE, resume=False)
    with pytest.raises(UsageError, match="nothing to resume"):
        preflight.check_out(tmp_path, RECIPE, resume=True)


def test_options_of_a_method_that_is_not_used_are_refused():
    with pytest.raises(UsageError, match="options for `awq`, which its method `gptq` does not use"):
        preflight.check_options(replace(RECIPE, options={"awq": {}}), Plugins.load([]))
