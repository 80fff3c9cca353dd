"""A run may be killed at any moment: `--resume` ends with the same bytes as a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Ran, deep, needs_plugins, run, start
from tiny_models import tiny_model

pytestmark = needs_plugins
RUN = (
    "run", "deep", "--plugin", "gptq", "--scheme", "w4a16-g32-asym", "--calib", "text.txt", "--eval", "text.txt",
    "--samples", "8", "--seq-len", "32",
)  # fmt: skip
BLOCKS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of six blocks, a text, and `undisturbed`: a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume") / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    deep(folder / "model", BLOCKS)
    (folder / "text.txt").write_text("".join(f"{number} cats sat on {number * number} mats; " for number in range(200)), encoding="utf-8")
    ran = run([*RUN, "--out", "undisturbed"], folder)
    assert ran.code in (0, 5), ran.err
    return folder


def sums(out: Path) -> dict[str, str]:
    """sha256 of every file that a run promises to repeat, by name."""
    files = [path for name in ("quantized", "artifact") for path in sorted((out / name).rglob("*")) if path.is_file()]
    assert len(files) > 2 * BLOCKS
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def found(out: Path) -> dict:
    """The report without what depends on the clock and the machine's memory."""
    return {name: value for name, value in json.loads((out / "report.json").read_text()).items() if name not in ("stages", "estimate")}


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def same(place: Path, out: str, ran: Ran) -> None:
    """The run in `out` ended, and with what the undisturbed one has: bytes, report, files, and a log that can be read."""
    assert ran.code in (0, 5), ran.err
    mine, undisturbed = place / out, place / "undisturbed"
    assert sums(mine) == sums(undisturbed)
    assert found(mine) == found(undisturbed)
    assert names(mine) == names(undisturbed)
    events = [json.loads(line) for line in (mine / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} >= {"stage", "block"}


#: The last moment before a name appears: what is about to happen · the name · which time in that process.
MOMENTS = (
    ("the state is written for the first time", "state.json", 1),
    ("the shard of all that is in no block is there", f"model-00001-of-{BLOCKS + 1:05d}.safetensors", 1),
    ("the third block's shard is there", f"model-00004-of-{BLOCKS + 1:05d}.safetensors", 1),
    ("its hidden states are there, after its shard", "quantized-00003.hidden", 1),
    ("the fourth block's note is there, after its shard and hidden states", "block-00003.json", 1),
    ("the model's config is there, after the last block", "quantized.partial/config.json", 1),
    ("all of the model is there", "quantized", 1),
    ("the state says that all of the model is there", "state.json", 2),
    ("the artifact is there", "artifact/compressed-tensors", 1),
    ("the artifact is noted", "work/artifacts.json", 1),
    ("the parity is noted", "work/parity.json", 1),
    ("the evaluation is noted", "work/evaluation.json", 1),
    ("the report is there", "report.json", 1),
    ("the page is there, after the report", "report.html", 1),
    ("the state says that all is done", "state.json", 2),
)


def test_a_run_killed_at_every_step_ends_with_the_same_bytes(place: Path):
    command: tuple[str, ...] = RUN
    for about_to, name, nth in MOMENTS:
        ran = run([*command, "--out", "steps"], place, die_at=name, nth=nth)
        assert ran.code == -9, f"not killed before {about_to}: {ran.err}"
        command = ("run", "--resume")
    same(place, "steps", run([*command, "--out", "steps"], place))


def test_a_run_killed_while_it_works_ends_with_the_same_bytes(place: Path):
    out = place / "moments"

    def exists(name: str, then_s: float = 0) -> Callable[[], bool]:
        return lambda: (out / name).exists() and (time.sleep(then_s) or True)

    def evaluating() -> bool:
        return '"stage": "evaluate quantized"' in (out / "events.jsonl").read_text()

    embedding = exists(f"quantized.partial/model-00001-of-{BLOCKS + 1:05d}.safetensors")
    command: tuple[str, ...] = RUN
    for moment in (embedding, exists("work/block-00001.json", 0.02), exists("work/block-00004.json", 0.02), evaluating):
        assert start([*command, "--out", "moments"], place).send(signal.SIGKILL, moment).code == -9
        command = ("run", "--resume")
    same(place, "moments", run([*command, "--out", "moments"], place))


def test_ctrl_c_says_how_to_go_on_and_that_works(place: Path):
    noted = place / "stopped" / "work" / "block-00001.json"
    ran = start([*RUN, "--out", "stopped"], place).send(signal.SIGINT, noted.exists)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.splitlines()[-1] == "interrupted: `qhub run --resume --out stopped` continues where it stopped"
    ran = run(["run", "--resume", "--out", "stopped"], place)
    assert "quantize  block 1/" not in ran.err
    assert "quantize  block 2/" not in ran.err
    same(place, "stopped", ran)


@pytest.mark.parametrize("plugins", [["rtn"], ["awq"], ["awq", "gptq"]], ids="+".join)
def test_every_method_resumes_with_the_same_bytes(place: Path, plugins: list[str]):
    method = "+".join(plugins)
    command = [argument for argument in RUN if argument not in ("--plugin", "gptq")]
    command += [part for plugin in plugins for part in ("--plugin", plugin)]
    assert run([*command, "--out", method], place).code in (0, 5)
    assert run([*command, "--out", f"{method} killed"], place, die_at="block-00003.json").code == -9
    assert run(["run", "--resume", "--out", f"{method} killed"], place).code in (0, 5)
    assert sums(place / f"{method} killed") == sums(place / method)


def test_a_recipe_repeated_gives_the_same_bytes(place: Path):
    same(place, "again", run(["run", "--recipe", "undisturbed/recipe.yaml", "--out", "again"], place))


def test_a_run_killed_before_its_recipe_is_there_has_nothing_to_resume_and_starts_anew(place: Path):
    assert run([*RUN, "--out", "early"], place, die_at="recipe.yaml").code == -9
    ran = run(["run", "--resume", "--out", "early"], place)
    hint = "leave out `--resume` to start a run"
    assert ran == (2, "", f"error: `early` has no recipe.yaml: there is nothing to resume\n\nhint: {hint}\n")
    assert run([*RUN, "--out", "early"], place, die_at="block-00000.json").code == -9


def test_resume_without_a_name_finds_the_unfinished_run(place: Path):
    assert run(RUN, place, die_at="block-00002.json").code == -9
    ran = run([*RUN, "--resume"], place)
    assert "\nout: runs/deep-gptq-host\n" in ran.err
    same(place, "runs/deep-gptq-host", ran)


def test_a_finished_run_resumed_shows_its_report_again(place: Path):
    before = sums(place / "undisturbed")
    ran = run(["run", "--resume", "--out", "undisturbed"], place)
    assert "targets" in ran.out
    assert "quantize" not in ran.err
    same(place, "undisturbed", ran)
    assert sums(place / "undisturbed") == before


# What a power cut may leave: names without their content, lines cut off, files of a moment that is over.


@pytest.fixture
def killed(place: Path) -> Path:
    """A run that was killed in its fifth block; four are done."""
    out = place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    assert run([*RUN, "--out", "killed"], place, die_at="block-00004.json").code == -9
    return out


def test_what_a_power_cut_left_half_written_is_written_again(place: Path, killed: Path):
    (killed / "work" / "block-00003.json").write_text("")
    (killed / "work" / "float-00009.partial").write_bytes(b"half")
    (killed / "quantized.partial" / "model-00005.partial").write_bytes(b"half")
    (killed / "state.json.partial").write_text('{"done":')
    with (killed / "events.jsonl").open("a") as log:
        log.write('{"time": 1795256566.3, "eve')
    same(place, "killed", run(["run", "--resume", "--out", "killed"], place))


def test_without_its_hidden_states_a_run_begins_again(place: Path, killed: Path):
    for path in (killed / "work").glob("*.hidden"):
        path.unlink()
    ran = run(["run", "--resume", "--out", "killed"], place)
    assert "quantize  block 1/" in ran.err
    same(place, "killed", ran)


def test_without_its_state_a_run_keeps_its_blocks(place: Path, killed: Path):
    (killed / "state.json").write_text("{")
    ran = run(["run", "--resume", "--out", "killed"], place)
    assert ran.code == 1
    (killed / "state.json").unlink()  # as the hint says
    ran = run(["run", "--resume", "--out", "killed"], place)
    assert "quantize  block 4/" not in ran.err
    same(place, "killed", ran)


def test_a_model_that_moved_is_found_where_the_user_says(place: Path, killed: Path):
    (place / "deep").rename(place / "elsewhere")
    try:
        assert run(["run", "--resume", "--out", "killed"], place).code == 1
        ran = run(["run", "elsewhere", "--recipe", "killed/recipe.yaml", "--resume"], place)
    finally:
        (place / "elsewhere").rename(place / "deep")
    same(place, "killed", ran)


def test_a_run_resumes_from_another_folder(place: Path, killed: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    same(place, "killed", run(["run", "--resume", "--out", killed], tmp_path / "there"))


def test_other_versions_of_what_a_run_began_with_are_one_warning(place: Path, killed: Path):
    recipe = killed / "recipe.yaml"
    text = recipe.read_text()
    python = next(line for line in text.splitlines() if line.startswith("  python: "))
    recipe.write_text(text.replace(python, "  python: 2.7.18"))
    ran = run(["run", "--resume", "--out", "killed"], place)
    assert ran.code in (0, 5)
    warning = (
        "warning: installed versions changed since this run began, so its bytes may differ from an uninterrupted run's: python 2.7.18 → "
    )
    assert ran.err.count(warning) == 1
    assert sums(killed) == sums(place / "undisturbed")
