"""What a real run says while it works and what it leaves on stdout: on a terminal, in a pipe, as JSON, beside broken plugins."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import PLUGINS, Ran, needs_plugins, run, start, terminal_output
from tiny_models import tiny_model

pytestmark = needs_plugins
RUN = ("run", "model", "--calib", "text.txt", "--eval", "text.txt", "--samples", "4", "--seq-len", "32", "--max-drop", "100")
SIZE = r"[\d.]+ (GB|MB|kB)"
SAID = rf"""model: model: LlamaForCausalLM, 0.09043 M parameters
route: gptq for host: w4a16-g32-sym, hf files, run by hf
text: calibration 4 × 32 tokens of text.txt, evaluation 60 × 32 tokens of text.txt
size: {SIZE} → {SIZE}
needs: {SIZE} memory, {SIZE} disk
out: out
quantize  …
quantize  block 1/2  error [\d.e-]+  [\d.]+ s left  {SIZE}
quantize  block 2/2  error [\d.e-]+  0.0 s left  {SIZE}
quantize  [\d.]+ s  peak {SIZE}
export  …
export  [\d.]+ s  peak {SIZE}
verify  …
verify  [\d.]+ s  peak {SIZE}
evaluate  …
(evaluate (float|quantized|rtn)  block \d/2  [\d.]+ s left  {SIZE}
){{6}}evaluate  [\d.]+ s  peak {SIZE}
report  …
report  [\d.]+ s  peak {SIZE}
files: out
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("progress") / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    (folder / "text.txt").write_text("".join(f"{number} cats sat on {number * number} mats; " for number in range(400)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Ran:
    """What `qhub run --json` said; its run directory is `out`. Symmetric: other libraries are at their noisiest then."""
    return run([*RUN, "--plugin", "gptq", "--scheme", "w4a16-g32-sym", "--out", "out", "--json"], place)


def test_in_a_pipe_a_run_says_plain_lines_and_no_library_adds_any(finished: Ran):
    assert finished.code == 0
    assert re.fullmatch(SAID, finished.err), finished.err


def test_json_of_a_run_is_its_report_and_nothing_else(place: Path, finished: Ran):
    assert json.loads(finished.out) == json.loads((place / "out" / "report.json").read_text())


# Each kind of event has these facts, whatever happens.
FACTS = {
    "stage start": {"time", "event", "name", "state"},
    "stage end": {"time", "event", "name", "state", "seconds", "peak_rss_bytes"},
    "block": {"time", "event", "stage", "index", "count", "name", "error", "seconds_left", "rss_bytes"},
    "warning": {"time", "event", "text"},
    "note": {"time", "event", "text"},
}


def test_the_event_log_has_every_stage_and_block_with_its_facts(place: Path, finished: Ran):
    events = [json.loads(line) for line in (place / "out" / "events.jsonl").read_text().splitlines()]
    for event in events:
        kind = f"stage {event['state']}" if event["event"] == "stage" else event["event"]
        assert set(event) - {"said"} == FACTS[kind]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    stages = [(event["name"], event["state"]) for event in events if event["event"] == "stage"]
    assert stages == [(name, state) for name in ("quantize", "export", "verify", "evaluate", "report") for state in ("start", "end")]
    blocks = [(event["stage"], event["index"], event["count"]) for event in events if event["event"] == "block"]
    done = ("quantize", "evaluate float", "evaluate quantized", "evaluate rtn")
    assert blocks == [(stage, index, 2) for stage in done for index in (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        (["recommend", "model"], {"model", "goals", "routes", "rejected"}),
        (["recommend", "model", "--all-targets", "--explain"], {"model", "goals", "routes", "rejected"}),
        (["run", "model", "--eval", "text.txt", "--calib", "text.txt", "--dry-run"], {"recipe", "route", "profile", "out", "estimate"}),
        (["eval", "out", "--data", "text.txt"], {"accuracy", "perplexity", "kl", "drop_pct", "float"}),
        (["eval", "out/artifact/compressed-tensors", "--data", "text.txt"], {"accuracy", "perplexity"}),
        (["eval", "model", "--data", "text.txt"], {"accuracy", "perplexity"}),
        (["inspect", "model"], {"architecture", "parameters", "classes", "quantized"}),
        (["inspect", "out/quantized"], {"architecture", "parameters", "classes", "quantized"}),
        (["report", "out"], {"float", "quantized", "baseline", "targets", "artifacts", "stages"}),
        (["plugins"], {"plugins"}),
        (["plugins", "list"], {"plugins"}),
        (["plugins", "info", "gptq"], {"name", "components"}),
        (["targets"], {"targets"}),
        (["targets", "list"], {"targets"}),
        (["targets", "show", "apple-m1"], {"name"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_json_is_one_document_on_stdout(place: Path, finished: Ran, arguments: list[str], has: set[str]):
    ran = run([*arguments, "--json"], place)
    assert ran.code == 0, ran.err
    assert has <= set(json.loads(ran.out))
    assert [line for line in ran.err.splitlines() if not re.match(r"evaluate |warning: groups of", line)] == []


def on_terminal(place: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and everything that appears when stdout and stderr are a terminal."""
    main, child = pty.openpty()
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: written.extend(terminal_output(main)))
    started = start(arguments, place, env={"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"}, terminal=Path(os.ttyname(child)))
    reader.start()
    started.process.join(120)
    os.close(child)
    reader.join(20)
    os.close(main)
    return started.process.exitcode, b"".join(written).decode()


def test_on_a_terminal_a_run_has_one_live_line_and_tables(place: Path):
    code, text = on_terminal(place, [*RUN, "--plugin", "rtn", "--scheme", "w4a16-g32-sym", "--out", "live"])
    assert code == 0
    live = [part for part in re.split(r"\r\x1b\[K", text) if part]
    moving = [part for part in live if "\n" not in part]
    assert moving[0] == "quantize  …"
    assert any(re.fullmatch(r"quantize  block 1/2  error .+ left  .+", part) for part in moving)
    assert any(re.fullmatch(r"evaluate float  block 2/2  .+", part) for part in moving)
    lasting = re.sub(r"[^\n]*\x1b\[K", "", text).replace("\r", "")
    for stage in ("quantize", "export", "verify", "evaluate", "report"):
        assert len(re.findall(rf"^{stage}  [\d.]+ s  peak {SIZE}$", lasting, re.MULTILINE)) == 1
    assert "block 1/2" not in lasting
    assert "next-token accuracy" in lasting
    assert lasting.rstrip().endswith("files: live")


MINI = """
from pathlib import Path
from qhub import ModelSource, hookimpl

@hookimpl
def qhub_models():
    folder = Path({!r})
    text = folder.parent / "text.txt"
    return [ModelSource("demo:llm", folder, "a tiny model", text, text)]
"""


def test_the_readmes_run_works_as_written_in_an_empty_directory(place: Path, toy_plugin: Callable[..., dict[str, str]], tmp_path: Path):
    env = toy_plugin("mini", MINI.format(str(place / "model")))  # a small demo:llm
    env["QHUB_PLUGINS"] += f",{','.join(PLUGINS)}"
    empty = tmp_path / "empty"
    empty.mkdir()
    ran = run(["run", "--plugin", "awq", "--target", "apple-m1"], empty, env=env)
    out = empty / "runs" / "demo-llm-awq-apple-m1"
    assert ran.code == (0 if json.loads((out / "report.json").read_text())["targets"]["met"] else 5)
    finish = "`qhub-mlx` or `qhub-gguf` (planned, not published yet) would finish it"
    said = ran.err.splitlines()
    assert said[0] == "no MODEL given: taking demo:llm"
    assert f"warning: nothing installed runs this on `apple-m1`: the run ends with the QuantizedModel; {finish}" in said
    assert said[-2:] == ["files: runs/demo-llm-awq-apple-m1", f"next: {finish} on `apple-m1`"]
    assert (out / "quantized" / "qhub.json").exists()
    assert (out / "artifact" / "compressed-tensors" / "config.json").exists()
    assert "not checked: nothing ran on `apple-m1` itself: figures are from this machine" in ran.out


# Other people's plugins: each broken in its own way, each one warning, and the run is as it would be without them.
BROKEN = {
    "absent": "import no_such_sdk",
    "exits": "import sys\nsys.exit('no licence')",
    "misspelt": "from qhub import hookimpl\n@hookimpl\ndef qhub_quantizer():\n    return []",
    "raises": "from qhub import hookimpl\n@hookimpl\ndef qhub_quantizers():\n    raise RuntimeError('no device')",
    "returns": "from qhub import hookimpl\n@hookimpl\ndef qhub_exporters():\n    return ['not an exporter']",
}
SLOPPY = """
import logging, sys, warnings
from qhub import Quantizer, hookimpl
print("thank you for installing sloppy")

class Sloppy(Quantizer):
    name = "sloppy"
    default_scheme = "w8a16"
    def quantize_layer(self, weight, scheme, block):
        from qhub import quantize_rtn
        print("sloppy is at work")
        warnings.warn("sloppy is deprecated", UserWarning)
        logging.getLogger("sloppy").warning("sloppy logs")
        if block.index == WHEN:
            raise KeyError("scale")
        return quantize_rtn(weight, scheme, block.dtype)

@hookimpl
def qhub_quantizers():
    return [Sloppy()]
"""


def test_broken_plugins_are_one_warning_each_and_a_run_goes_on(place: Path, finished: Ran, toy_plugin: Callable[..., dict[str, str]]):
    for name, source in BROKEN.items():
        env = toy_plugin(name, source)
    env["QHUB_PLUGINS"] += f",{','.join(PLUGINS)}"
    ran = run([*RUN, "--plugin", "gptq", "--scheme", "w4a16-g32-sym", "--out", "beside", "--json"], place, env=env)
    assert ran.code == 0
    warnings = [line.partition(" in plugin ")[0] for line in ran.err.splitlines() if line.startswith("warning: ")]
    assert sorted(warnings) == [
        "warning: plugin `absent` of `qhub-absent` was left out: ModuleNotFoundError: No module named 'no_such_sdk'",
        "warning: plugin `exits` of `qhub-exits` was left out: SystemExit: no licence",
        "warning: plugin `misspelt` of `qhub-misspelt` was left out: PluginValidationError: unknown hook 'qhub_quantizer'",
        "warning: plugin `raises` of `qhub-raises` failed in `qhub_quantizers`: RuntimeError: no device",
        "warning: plugin `returns` of `qhub-returns` failed in `qhub_exporters`: AttributeError: 'str' object has no attribute 'name'",
    ]
    assert re.fullmatch(
        SAID.replace("out: out", "out: beside").replace("files: out", "files: beside"), re.sub(r"warning: .*\n", "", ran.err)
    )
    mine, theirs = json.loads(ran.out), json.loads(finished.out)
    assert mine["artifacts"][0]["sha256"] == theirs["artifacts"][0]["sha256"]
    assert mine["warnings"] == theirs["warnings"]


def test_a_plugin_that_talks_spoils_neither_data_nor_progress(place: Path, toy_plugin: Callable[..., dict[str, str]]):
    env = toy_plugin("sloppy", SLOPPY.replace("WHEN", "-1"))
    env["QHUB_PLUGINS"] += f",{','.join(PLUGINS)}"
    ran = run([*RUN, "--plugin", "sloppy", "--out", "talks", "--json"], place, env=env)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["method"] == "sloppy"
    assert "deprecated" not in ran.err
    assert "logs" not in ran.err


@pytest.mark.parametrize("index", [0, 1], ids=["first", "second"])
def test_a_method_that_fails_is_named(place: Path, toy_plugin: Callable[..., dict[str, str]], index: int):
    env = toy_plugin("sloppy", SLOPPY.replace("WHEN", str(index)))
    env["QHUB_PLUGINS"] += f",{','.join(PLUGINS)}"
    ran = run([*RUN, "--plugin", "sloppy", "--out", f"fails{index}"], place, env=env)
    hint = "run it again with `QHUB_TRACEBACK=1` set and report what it prints"
    go_on = f"; once it is mended, `qhub run --resume --out fails{index}` goes on" if index else ""
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.endswith(f"error: stage `quantize` failed in `sloppy`: KeyError: 'scale'\n\nhint: {hint}{go_on}\n")
    assert (place / f"fails{index}").exists() == bool(index)
