"""Which texts a run uses: the user's, the model's own, the demo's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qhub import texts
from qhub.errors import UsageError
from qhub.plugins import Plugins
from qhub.types import Calibration, ModelSource, Recipe


@pytest.fixture
def here(tmp_path):
    for name in ("given.txt", "demo-calibration.txt", "demo-heldout.txt", "model/calibration.txt", "model/heldout.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "bare").mkdir()
    return tmp_path


def plugins(here: Path | None) -> Plugins:
    """Plugins that bring the demo model, or nothing."""
    found = Plugins.load([])
    demo = here and ModelSource("demo:llm", here, "a demo", here / "demo-calibration.txt", here / "demo-heldout.txt")
    found.__dict__["models"] = {"demo:llm": demo} if demo else {}
    return found


def source(here: Path, name: str) -> ModelSource:
    return ModelSource(name, here / name, "a model")


# model · what the user gives · whether the demo is installed · calibration · evaluation
@pytest.mark.parametrize(
    ("model", "given", "demo", "expected"),
    [
        ("model", (None, None), True, ("model/calibration.txt", "model/heldout.txt")),
        ("bare", (None, None), True, ("demo-calibration.txt", "demo-heldout.txt")),
        ("model", ("given.txt", None), False, ("given.txt", "model/heldout.txt")),
        ("bare", ("given.txt", "given.txt"), False, ("given.txt", "given.txt")),
        ("model", ("demo:llm", "demo:llm"), True, ("demo-calibration.txt", "demo-heldout.txt")),
    ],
    ids=["its own", "the demo's", "one given", "both given", "named like a model"],
)
def test_texts_of_a_run(here, monkeypatch, model, given, demo, expected):
    monkeypatch.chdir(here)
    found = texts.of_run(source(here, model), given, plugins(here if demo else None))
    assert [path.resolve().relative_to(here).as_posix() for path in found] == list(expected)


@pytest.mark.parametrize(("given", "option"), [((None, None), "--calib"), (("given.txt", None), "--eval")])
def test_without_any_text_the_option_is_named(here, monkeypatch, given, option):
    monkeypatch.chdir(here)
    with pytest.raises(UsageError) as error:
        texts.of_run(source(here, "bare"), given, plugins(None))
    assert error.value.hint == f"give one: `{option} TEXT` (.txt, .jsonl or .parquet)"


@pytest.mark.parametrize(("name", "what"), [("gone.txt", "does not exist"), ("model", "is a folder, not a text")])
def test_a_text_that_is_none_is_named(here, monkeypatch, name, what):
    monkeypatch.chdir(here)
    with pytest.raises(UsageError, match=f"data file `{name}` {what}"):
        texts.of_run(source(here, "model"), (name, None), plugins(None))


def test_the_demos_text_for_another_model_is_said(here):
    def recipe(model: str, calibration: str | None, evaluation: str) -> Recipe:
        data = [None if name is None else Calibration(str(here / name)) for name in (calibration, evaluation)]
        return Recipe(model, "", "", "host", "gptq", "w8a16", calibration=data[0], evaluation=data[1])

    demo = plugins(here)
    both = texts.borrowed(recipe("m", "demo-calibration.txt", "demo-heldout.txt"), demo)
    assert both == "`m` brings no text, so demo:llm's is used, which may be unlike its own: give yours with `--calib` and `--eval`"
    one = texts.borrowed(recipe("m", None, "demo-heldout.txt"), demo)
    assert one == "`m` brings no text, so demo:llm's is used, which may be unlike its own: give yours with `--eval`"
    assert texts.borrowed(recipe("m", "given.txt", "given.txt"), demo) is None
    assert texts.borrowed(recipe("demo:llm", "demo-calibration.txt", "demo-heldout.txt"), demo) is None
    assert texts.borrowed(recipe("m", "given.txt", "given.txt"), plugins(None)) is None


@pytest.mark.parametrize(
    ("folder", "recorded", "given", "expected"),
    [
        ("model", "given.txt", None, "given.txt"),
        ("model", None, None, "model/heldout.txt"),
        ("bare", None, None, "demo-heldout.txt"),
        ("bare", "gone.txt", None, "demo-heldout.txt"),
        ("model", "given.txt", "demo:llm", "demo-heldout.txt"),
    ],
    ids=["what its run used", "its own", "the demo's", "the run's is gone", "named like a model"],
)
def test_text_of_an_evaluation(here, folder, recorded, given, expected):
    used = None if recorded is None else Calibration(str(here / recorded))
    assert texts.of_evaluation(here / folder, used, given, plugins(here)) == here / expected


def test_an_evaluation_without_a_text_names_the_option(here):
    with pytest.raises(UsageError) as error:
        texts.of_evaluation(here / "bare", None, None, plugins(None))
    assert error.value.hint == "give one: `--data TEXT` (.txt, .jsonl or .parquet)"


# The texts of a recipe that is repeated: where they are now, if they are still the same.


def recorded(here: Path, *, calibration: str = "given.txt", evaluation: str = "demo-heldout.txt") -> Recipe:
    """A recipe with texts of these contents, at places where nothing is now."""
    data = [replace(texts.describe(here / name, 8, 64), data=f"/elsewhere/{name}") for name in (calibration, evaluation)]
    return Recipe("bare", "", "", "host", "gptq", "w8a16", calibration=data[0], evaluation=data[1])


def now(here: Path, recipe: Recipe, *given: str | None, model: str = "bare") -> tuple[str, str]:
    found = texts.again(recipe, source(here, model), given or (None, None), plugins(here))
    assert (found.calibration.data_sha256, found.calibration.samples) == (recipe.calibration.data_sha256, 8)
    return found.calibration.data, found.evaluation.data


def test_a_recorded_text_is_where_it_was_or_where_the_user_says_or_among_those_that_were_brought(here):
    recipe = recorded(here)
    assert now(here, recipe) == ("/elsewhere/given.txt", str(here / "demo-heldout.txt"))
    assert now(here, recipe, str(here / "given.txt"), None) == (str(here / "given.txt"), str(here / "demo-heldout.txt"))
    assert now(here, recipe, None, "demo:llm") == ("/elsewhere/given.txt", str(here / "demo-heldout.txt"))
    there = replace(recipe, calibration=texts.describe(here / "given.txt", 8, 64))
    assert now(here, there)[0] == str(here / "given.txt")


def test_a_text_of_the_model_itself_is_found_again(here):
    recipe = recorded(here, calibration="model/calibration.txt", evaluation="model/heldout.txt")
    assert now(here, recipe, model="model") == (str(here / "model/calibration.txt"), str(here / "model/heldout.txt"))
    (here / "model/calibration.txt").write_text("another text")
    assert now(here, recipe, model="model")[0] == "/elsewhere/model/calibration.txt"


def test_a_text_for_a_recipe_without_one_is_refused(here):
    with pytest.raises(UsageError, match="the recipe uses no calibration text"):
        texts.again(replace(recorded(here), calibration=None), source(here, "bare"), (str(here / "given.txt"), None), plugins(here))
    with pytest.raises(UsageError, match=r"data file `gone\.txt` does not exist"):
        texts.again(recorded(here), source(here, "bare"), ("gone.txt", None), plugins(here))
