"""`qhub run` on a module of the user's own: the branch that the chart says, and a run that is killed while it trains."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from qat_networks import pictures, trained
from safetensors.torch import save_file

MODULE = Path(__file__).with_name("qat_networks.py")
INSTALLED = {distribution.name for distribution in importlib.metadata.distributions()}
pytestmark = pytest.mark.skipif("qhub-qat" not in INSTALLED, reason="qhub-qat is not installed (make test installs it)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the user's module, its weights, its data and how they are preprocessed."""
    found = tmp_path_factory.mktemp("user")
    shutil.copyfile(MODULE, found / "mine.py")
    save_file(trained().state_dict(), found / "mine.safetensors")
    arrays = {}
    for part, count, seed in (("train", 256, 1), ("test", 128, 2)):
        x, y = pictures(count, seed)
        arrays[f"{part}_x"] = np.clip(x.transpose(0, 2, 3, 1) * 32 + 128, 0, 255).astype(np.uint8)
        arrays[f"{part}_y"] = y
    np.savez(found / "data.npz", **arrays)
    steps = {"layout": "nchw", "scale": 1 / 32, "mean": [4.0] * 3, "std": [1.0] * 3}
    (found / "pre.json").write_text(json.dumps(steps))
    return found


def command(*arguments, plugins="qat"):
    variables = {"QHUB_PLUGINS": plugins, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "QHUB_NO_HISTORY": "1"}
    return [sys.executable, "-m", "qhub", *map(str, arguments)], {**os.environ, **variables}


def arguments(out, *more):
    data = ("--calib", "data.npz#train", "--eval", "data.npz#test", "--preprocess", "pre.json")
    return ("run", "mine:Small", "--weights", "mine.safetensors", *data, "--out", out, *more)


def run(folder, *given, plugins="qat"):
    line, environment = command(*given, plugins=plugins)
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(folder):
    """The run that nothing interrupts."""
    ran = run(folder, *arguments("whole", "--retrain", "--scheme", "w4a4-static"))
    assert ran.returncode in (0, 5), ran.stderr
    return folder / "whole"


def test_retrain_follows_the_branch_that_trains(finished):
    report = json.loads((finished / "report.json").read_text())
    assert (report["method"], report["scheme"]) == ("qat", "w4a4-static")
    walked = {step["node"]: step["answer"] for step in report["path"]}
    assert walked["B"] == "yes"
    assert "C" in walked
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "note" and event["text"].startswith("round 1 of training: accuracy valid?") for event in events)
    assert any(event["event"] == "block" and "epoch 1" in event["name"] for event in events)
    assert {item["layer"] for item in report["fallbacks"]} == {"conv1", "linear", "training"}


def test_all_items_are_trained_on_not_those_that_suffice_for_ranges(finished):
    assert "samples: 50000" in (finished / "recipe.yaml").read_text()


@pytest.mark.skipif("qhub-ptq" not in INSTALLED, reason="qhub-ptq is not installed (make test installs it)")
def test_no_retrain_follows_the_other_branch(folder):
    ran = run(folder, *arguments("other", "--no-retrain"), plugins="qat,ptq")
    assert ran.returncode in (0, 5), ran.stderr
    report = json.loads((folder / "other" / "report.json").read_text())
    assert report["method"] == "ptq"
    walked = {step["node"]: step["answer"] for step in report["path"]}
    assert walked["B"] == "no"
    assert "C" not in walked


def test_a_run_that_is_killed_while_it_trains_goes_on_and_ends_the_same(folder, finished):
    line, environment = command(*arguments("killed", "--retrain", "--scheme", "w4a4-static"))
    process = subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = folder / "killed" / "work" / "checkpoint.safetensors", time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "killed after the first epoch"
    assert not (folder / "killed" / "quantized").exists()
    ran = run(folder, "run", "--resume", "--out", "killed")
    assert ran.returncode in (0, 5), ran.stderr
    assert contents(folder / "killed" / "quantized") == contents(finished / "quantized")
