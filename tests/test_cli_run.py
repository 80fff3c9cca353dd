"""`qhub run` before the work starts: what it takes, and what it refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("qhub.pipeline")

TAKES_DEMO = "no MODEL given: taking demo:llm"
TAKES_FOLDER = "no MODEL given: taking the model folder here"


def test_without_a_model_the_demo_is_taken_and_said_so(qhub):
    ran = qhub("run", "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    first, error = ran.err.splitlines()[:2]
    assert first == TAKES_DEMO
    assert error.startswith("error: ")
    assert "`demo:llm`" in error


def test_without_a_model_the_folder_here_comes_first(qhub, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    ran = qhub("run", "--dry-run")
    assert (ran.code, ran.out) == (1, "")
    first, error = ran.err.splitlines()[:2]
    assert first == TAKES_FOLDER
    assert error.startswith("error: ")
    assert "internal" not in error


# Refused before anything is read or written: exit code, no output, no directory.
@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["gone"], 2, "`gone`"),
        (["--plugin", "nope"], 2, "`nope`"),
        (["--target", "nope"], 2, "`nope`"),
        (["--scheme", "w4a16-g48-asym"], 2, "`48`"),
        (["--scheme", "int4"], 2, "`int4`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_exist_is_named_and_nothing_is_written(qhub, tmp_path, arguments, code, named):
    before = sorted(tmp_path.rglob("*"))
    ran = qhub("run", *arguments)
    assert (ran.code, ran.out) == (code, "")
    error = next(line for line in ran.err.splitlines() if line.startswith("error: "))
    assert named in error
    assert "internal" not in error
    assert "Traceback" not in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_recipe_is_one_error(qhub, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: [", encoding="utf-8")
    ran = qhub("run", "--recipe", "recipe.yaml")
    assert (ran.code in (1, 2), ran.out) == (True, "")
    assert ran.err.startswith("error: `recipe.yaml`")
