"""A stage is a function from files to files: in this process, or `python -m qhub.stage NAME RUN_DIR` in one of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from forked import needs_plugins
from tiny_models import random_ids, tiny_model

from qhub import pipeline, stage
from qhub.errors import PluginError, QhubError
from qhub.events import Events
from qhub.plugins import Plugins
from qhub.quantize.store import folder_digest
from qhub.route.recipe import to_yaml
from qhub.rundir import RunDir

pytestmark = needs_plugins
ROOT = Path(__file__).parent.parent
STAGES = ["quantize", "export", "verify", "evaluate", "report"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The plan of a run with RTN, which needs no data to quantize."""
    text = tmp_path_factory.mktemp("text") / "random.txt"
    text.write_text("".join(map(chr, (random_ids(60, 64) % 95 + 32).flatten().tolist())), encoding="utf-8")
    plugins = Plugins.load([point for point in metadata.entry_points(group="qhub") if point.name in ("rtn", "hf")])
    request = pipeline.RunRequest(
        model=str(tiny_model("llama")), plugins=("rtn", "hf"), scheme="w4a16-g32-sym", eval=str(text), calib=str(text), seq_len=64,
        device="cpu", out=tmp_path_factory.mktemp("runs") / "planned",
    )  # fmt: skip
    return pipeline.plan(request, plugins)


@pytest.fixture
def run_dir(plan, tmp_path):
    """A run of it that has not begun."""
    return RunDir.create(tmp_path / "run", plan.settings, to_yaml(plan.recipe))


@pytest.fixture(autouse=True)
def _only_these_plugins(monkeypatch):
    monkeypatch.setenv("QHUB_PLUGINS", "rtn,hf")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_stages_one_by_one_give_what_a_run_gives(plan, run_dir, tmp_path, capsys):
    for name in STAGES:
        assert stage.main([name, str(run_dir.path)]) == 0
        assert RunDir.open(run_dir.path).done[-1] == name
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(event["name"], event["state"]) for event in events if event["event"] == "stage"] == [(name, "start"), (name, "end")]
    whole = pipeline.run(replace(plan, out=tmp_path / "whole"), Plugins.load(), Events())
    assert folder_digest(run_dir.quantized) == folder_digest(tmp_path / "whole" / "quantized")
    assert json.loads((run_dir.path / "report.json").read_text())["quantized"] == whole.to_json()["quantized"]
    assert [path for path in files(run_dir.path) if not path.startswith("work/")] == files(tmp_path / "whole")


def test_in_a_process_of_its_own_progress_is_json_lines(run_dir):
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qhub.stage", "quantize", str(run_dir.path)]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [event["event"] for event in events] == ["stage", "block", "block", "stage"]
    assert events == [json.loads(line) for line in run_dir.events.read_text().splitlines()]
    assert (run_dir.quantized / "config.json").exists()
    assert not run_dir.partial.exists()


@pytest.mark.parametrize("arguments", [[], ["quantize"], ["nothing", "."], ["quantize", ".", "more"]], ids=" ".join)
def test_wrong_arguments_are_a_usage_line(arguments, capsys):
    assert stage.main(arguments) == 2
    assert capsys.readouterr() == ("", "usage: python -m qhub.stage {quantize,export,verify,evaluate,report} RUN_DIR\n")


def test_a_folder_that_is_no_run_is_one_error(tmp_path, capsys):
    assert stage.main(["quantize", str(tmp_path)]) == 1
    said = capsys.readouterr()
    message, hint = f"`{tmp_path}` is not a run directory: it has no state.json", "`qhub run` makes one"
    assert said.err == f"error: {message}\n\nhint: {hint}\n"
    assert json.loads(said.out) == {"event": "error", "kind": "QhubError", "message": message, "hint": hint}


@pytest.mark.parametrize(("name", "missing"), [("verify", "work/artifacts.json"), ("report", "work/artifacts.json")])
def test_a_stage_whose_input_is_missing_names_it(run_dir, capsys, name, missing):
    assert stage.main([name, str(run_dir.path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: `{run_dir.path}` has no {missing}: the stage before has not run\n\nhint: ")
    assert RunDir.open(run_dir.path).done == ()


PLUGIN = """
from qhub import Quantizer, hookimpl, quantize_rtn

class Failing(Quantizer):
    name = "rtn"
    requires = ()

    def quantize_layer(self, weight, scheme, block):
        {statement}

@hookimpl
def qhub_quantizers():
    return [Failing()]
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Plugins whose `rtn` does this instead."""

    def make(statement):
        (tmp_path / "qhub_toy_failing.py").write_text(PLUGIN.format(statement=statement), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "qhub_toy_failing", raising=False)
        return Plugins.load([metadata.EntryPoint("rtn", "qhub_toy_failing", "qhub")])

    return make


def test_a_plugin_that_fails_is_named_with_what_it_said(run_dir, failing):
    with pytest.raises(PluginError) as error:
        stage.execute("quantize", run_dir, failing("raise ValueError('bad day\\nat work')"), Events())
    assert error.value.message == "stage `quantize` failed in `rtn`: ValueError: bad day"
    assert "QHUB_TRACEBACK=1" in error.value.hint
    assert RunDir.open(run_dir.path).done == ()
    assert not run_dir.quantized.exists()


def test_a_plugin_that_misses_the_network_is_named_too(run_dir, failing):
    with pytest.raises(PluginError) as error:
        stage.execute("quantize", run_dir, failing("import socket; raise socket.gaierror(-2, 'Name or service not known')"), Events())
    assert error.value.message == "stage `quantize` failed in `rtn`: gaierror: [Errno -2] Name or service not known"


def test_with_a_traceback_asked_for_its_error_passes_as_it_is(run_dir, failing, monkeypatch):
    monkeypatch.setenv("QHUB_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad day"):
        stage.execute("quantize", run_dir, failing("raise ValueError('bad day')"), Events())


def test_a_full_disk_is_nobodys_fault(run_dir, failing):
    with pytest.raises(OSError, match="No space left") as error:
        stage.execute("quantize", run_dir, failing("raise RuntimeError('I/O error: No space left on device (os error 28)')"), Events())
    assert error.value.errno == errno.ENOSPC


def test_a_plugins_own_refusal_passes_as_it_is(run_dir, failing):
    with pytest.raises(QhubError) as error:
        stage.execute("quantize", run_dir, failing("from qhub import Unsupported; raise Unsupported('not this')"), Events())
    assert (error.value.message, int(error.value.exit_code)) == ("not this", 3)


def test_hidden_states_may_take_a_quarter_of_the_memory():
    assert stage.hidden_limit_bytes(4_000_000_000) == 1_000_000_000
    assert 0 < stage.hidden_limit_bytes(None) <= 2 << 30


def test_an_artifact_that_nothing_here_opens_is_not_checked_and_says_why(plan, run_dir):
    plugins = Plugins.load()
    for name in ("quantize", "export"):
        stage.execute(name, run_dir, plugins, Events())
    without = Plugins.load([point for point in metadata.entry_points(group="qhub") if point.name == "rtn"])
    stage.execute("verify", run_dir, without, Events())
    (check,) = run_dir.read("work/parity.json").values()
    why = "a runtime for this format is not installed here; codes, scales and zeros read back from the file: the same"
    assert check == {"checked": False, "codes_identical": True, "how": why}
