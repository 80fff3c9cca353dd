"""The run directory: what is written is whole, what was left half written goes, and two processes never share one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qhub.errors import QhubError, UsageError
from qhub.rundir import RunDir, Settings, locked


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run", Settings("cpu", 4_000_000_000), "model: m\n")


def test_a_run_directory_is_read_back_as_it_was_written(run):
    assert run.recipe.read_text() == "model: m\n"
    assert RunDir.open(run.path) == run
    done = run.finished("quantize").finished("export")
    assert RunDir.open(run.path) == done
    assert (done.done, done.settings) == (("quantize", "export"), run.settings)
    assert sorted(path.name for path in run.path.iterdir()) == ["recipe.yaml", "state.json"]


def test_a_folder_without_a_state_is_no_run_directory(tmp_path):
    with pytest.raises(QhubError, match="is not a run directory"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize(
    "state",
    ["", "{", "[]", "null", "{}", '{"settings": {}}', '{"settings": {}, "done": "quantize"}', '{"settings": {"colour": 1}, "done": []}'],
)
def test_a_damaged_state_is_an_error_that_says_how_to_go_on(run, state):
    (run.path / "state.json").write_text(state)
    with pytest.raises(QhubError, match=r"state\.json` is damaged") as error:
        RunDir.open(run.path)
    assert error.value.hint == f"`rm {run.path}/state.json`, then `qhub run --resume --out {run.path}`: finished blocks are kept"


def test_what_a_stage_left_is_read_by_the_next(run):
    run.work.mkdir()
    run.write("work/parity.json", {"a": [1, None]})
    assert run.read("work/parity.json") == {"a": [1, None]}
    assert [path.name for path in run.work.iterdir()] == ["parity.json"]
    with pytest.raises(QhubError, match=r"has no work/other\.json: the stage before has not run"):
        run.read("work/other.json")
    (run.work / "parity.json").write_text("{")
    with pytest.raises(QhubError, match=r"parity\.json` is damaged"):
        run.read("work/parity.json")


def test_only_a_block_a_stage_or_a_model_is_a_result(run):
    run.work.mkdir()
    (run.work / "float.spool").touch()
    run.partial.mkdir()
    assert not run.holds_results
    assert run.finished("quantize").holds_results
    (run.work / "block-00000.json").touch()
    assert run.holds_results
    (run.work / "block-00000.json").unlink()
    run.quantized.mkdir()
    assert run.holds_results


def test_tidying_removes_what_is_half_written_and_nothing_else(run):
    run.work.mkdir()
    run.partial.mkdir()
    half = [run.path / "state.json.partial", run.work / "block-00000.partial", run.partial / "model-00001-of-00003.partial"]
    whole = [run.work / "block-00000.json", run.partial / "model-00001-of-00003.safetensors"]
    for path in (*half, *whole):
        path.touch()
    run.tidy()
    assert [path.exists() for path in (*half, *whole)] == [False] * 3 + [True] * 2
    assert run.partial.is_dir()


@pytest.mark.parametrize("rest", ["", '{"event": "blo', '{"event": "note", "text": "no end of line"}', "\0\0\0"], ids=repr)
def test_tidying_cuts_a_log_after_its_last_whole_line(run, rest):
    whole = '{"time": 1, "event": "note", "text": "µ"}\n'
    run.events.write_text(whole + rest, encoding="utf-8")
    run.tidy()
    assert run.events.read_text(encoding="utf-8") == whole


def test_the_log_is_read_without_what_is_no_event(run):
    assert run.log() == []
    run.events.write_bytes(b'{"event": "note"}\n\0\0\0\n[1]\n{"time": 3}\n\xff\n{"event": "warning"}\n{"eve')
    assert run.log() == [{"event": "note"}, {"event": "warning"}]


def test_discarding_removes_the_run_and_leaves_what_is_not_its_own(run):
    for folder in (run.work, run.partial, run.artifacts):
        folder.mkdir()
    run.events.touch()
    (run.path / "thesis.txt").touch()
    run.discard()
    assert [path.name for path in run.path.iterdir()] == ["thesis.txt"]


def test_a_lock_makes_the_directory_and_removes_it_if_it_stays_empty(tmp_path):
    with locked(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "recipe.yaml").touch()
    assert (tmp_path / "runs" / "one" / "recipe.yaml").exists()


def test_an_empty_directory_that_was_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_second_process_is_kept_out_until_the_first_one_ends(tmp_path):
    with locked(tmp_path):
        script = f"from pathlib import Path\nfrom qhub.rundir import locked\nwith locked(Path({str(tmp_path)!r})): pass"
        tried = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert tried.returncode == 1
        assert "UsageError" in tried.stderr
        assert "is in use" in tried.stderr
        with pytest.raises(UsageError, match="is in use"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    script = "import os, time\nfrom pathlib import Path\nfrom qhub.rundir import locked\n"
    script += f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError), locked(tmp_path):
            pass
        os.kill(holder.pid, 9)
        holder.wait()
    with locked(tmp_path):
        pass
