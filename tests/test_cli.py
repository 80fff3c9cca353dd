"""The command line: exact exit codes, stdout and stderr, in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import terminal_output

ROOT = Path(__file__).parent.parent
HELP = """\
Usage: qhub [OPTIONS] COMMAND [ARGS]...

  Quantize a neural network once, deploy it anywhere.

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
  recommend  Which way to take a model to a device, and why
  run        Quantize, export, evaluate and report in one go
  eval       Measure an artifact on a text
  bench      Measure how fast an artifact runs here
  chat       Talk to a model, in a terminal or through a pipe
  convert    Write a quantized model in another layout
  inspect    What a model or an artifact is, from its headers
  report     Show what a run found
  reproduce  Repeat a run, and say that all is the same or what is not
  plugins    Which methods, formats and engines are installed
  targets    Which devices are known, and their facts
"""
KNOWN = (
    "known: bench, chat, convert, eval, inspect, plugins, recommend, report, reproduce, run, targets "
    "(a plugin may bring it: `pip install qhub-{}`)"
)
SEE_RUN = "see `qhub run --help`"


def adding(body):
    """The source of a plugin that adds the command `toy`, which does `body` with `app`."""
    indented = "\n".join(f"        {line}" for line in body.splitlines())
    return f"""
import click
from qhub import hookimpl

@hookimpl
def qhub_commands(cli):
    @cli.command(short_help="A toy")
    @click.pass_obj
    def toy(app):
{indented}
"""


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=["nothing", "--help", "-h"])
def test_help_lists_the_commands(qhub, arguments):
    assert qhub(*arguments) == (0, HELP, "")


def test_version_is_one_line(qhub):
    assert qhub("--version") == (0, "qhub 0.1.0\n", "")


# What the user got wrong: exit code 2, nothing on stdout, and a way on.
@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["frobnicate"], "unknown command `frobnicate`", KNOWN.format("frobnicate")),
        (["reports"], "unknown command `reports`", "did you mean `report`? " + KNOWN.format("reports")),
        (["--frobnicate"], "unknown option `--frobnicate`", "see `qhub --help`"),
        (["run", "--sheme", "w8a16"], "unknown option `--sheme`", "did you mean `--scheme`? see `qhub run --help`"),
        (["run", "--tune"], "unknown option `--tune`", SEE_RUN),
        (["run", "--scheme"], "option `--scheme` requires an argument", "see `qhub --help`"),
        (["run", "a", "b"], "got unexpected extra argument (b)", SEE_RUN),
        (["run", "--device", "gpu"], "invalid value for `--device`: `gpu` is not one of `auto`, `cpu`, `cuda`, `mps`", SEE_RUN),
        (["run", "--samples", "0"], "invalid value for `--samples`: 0 is not in the range x>=1", SEE_RUN),
        (["run", "--max-memory", "0"], "invalid value for `--max-memory`: 0.0 is not in the range x>0", SEE_RUN),
        (["run", "--recipe", "gone.yaml"], "invalid value for `--recipe`: file `gone.yaml` does not exist", SEE_RUN),
        (
            ["run", "--resume", "--out", "gone"],
            "`gone` has no recipe.yaml: there is nothing to resume",
            "leave out `--resume` to start a run",
        ),
        (["eval"], "missing argument `ARTIFACT`", "see `qhub eval --help`"),
        (["eval", "gone"], "invalid value for `ARTIFACT`: path `gone` does not exist", "see `qhub eval --help`"),
        (["report", "gone"], "invalid value for `RUN`: path `gone` does not exist", "see `qhub report --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_error_and_a_hint(qhub, arguments, message, hint):
    assert qhub(*arguments) == (2, "", f"error: {message}\n\nhint: {hint}\n")


def test_a_broken_plugin_is_one_warning_and_all_else_works(qhub, toy_plugin):
    toy_plugin("bad", "import no_such_sdk")
    env = toy_plugin("good", adding("app.output.print('hello')"))
    warning = "warning: plugin `bad` of `qhub-bad` was left out: ModuleNotFoundError: No module named 'no_such_sdk'\n"
    assert qhub("--help", env=env) == (0, HELP + "  toy        A toy\n", warning)
    assert qhub("toy", env=env) == (0, "hello\n", warning)
    assert qhub("toy", env={**env, "QHUB_DISABLED_PLUGINS": "bad"}) == (0, "hello\n", "")


def test_a_plugin_cannot_replace_a_command_of_the_core(qhub, toy_plugin):
    env = toy_plugin("thief", adding("app.output.print('stolen')").replace("def toy", "def report"))
    assert qhub("report", env=env) == (2, "", "error: missing argument `RUN`\n\nhint: see `qhub report --help`\n")


# What can go wrong inside a command, whoever wrote it.
@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("from qhub import QhubError\nraise QhubError('`x` broke', hint='mend `x`')", 1, "error: `x` broke\n\nhint: mend `x`\n"),
        ("from qhub import QhubError\nraise QhubError('`x` broke')", 1, "error: `x` broke\n"),
        ("from qhub import NoRouteError\nraise NoRouteError('no way')", 3, "error: no way\n"),
        ("from qhub import PluginError\nraise PluginError('toy failed')", 4, "error: toy failed\n"),
        ("from qhub import ExitCode\nreturn ExitCode.TARGETS_NOT_MET", 5, ""),
        (
            "1 / 0",
            1,
            "error: internal error: ZeroDivisionError: division by zero\n\n"
            "hint: run it again with `QHUB_TRACEBACK=1` set and report what it prints\n",
        ),
        ("open('/gone/x')", 1, "error: `/gone/x`: no such file or directory\n\nhint: check the path and its permissions\n"),
        (
            "app.resume = 'qhub run --resume --out x'\nraise OSError(28, 'No space left on device', 'x/w.safetensors')",
            1,
            "error: no space left on the device for `x/w.safetensors`\n\nhint: free some space, then `qhub run --resume --out x`\n",
        ),
        ("raise MemoryError", 1, "error: out of memory\n\nhint: give a bound with `--max-memory GB`, or close other programs\n"),
        ("import warnings\nfor _ in range(2):\n    warnings.warn('mind this', stacklevel=1)", 0, "warning: mind this\n"),
        ("raise KeyboardInterrupt", 130, "\ninterrupted: nothing was left half written\n"),
    ],
    ids=["error", "no-hint", "no-route", "plugin", "missed", "internal", "file", "full-disk", "memory", "warning", "interrupt"],
)
def test_failures_are_said_and_have_their_exit_code(qhub, toy_plugin, body, code, stderr):
    assert qhub("toy", env=toy_plugin("toy", adding(body))) == (code, "", stderr)


def test_traceback_is_shown_when_it_is_asked_for(qhub, toy_plugin):
    ran = qhub("toy", env={**toy_plugin("toy", adding("1 / 0")), "QHUB_TRACEBACK": "1"})
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert "error: internal error: ZeroDivisionError: division by zero\n" in ran.err


def started(tmp_path, env, **streams):
    variables = {**os.environ, **env}
    return subprocess.Popen(
        [sys.executable, "-m", "qhub", "toy"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, **streams
    )


def test_ctrl_c_ends_with_one_line_that_says_how_to_resume(tmp_path, toy_plugin):
    body = "import time\napp.resume = 'qhub run --resume --out x'\nprint('ready', flush=True)\ntime.sleep(60)"
    with started(tmp_path, toy_plugin("toy", adding(body)), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "\ninterrupted: `qhub run --resume --out x` continues where it stopped\n"


def test_a_closed_pipe_is_quiet(tmp_path, toy_plugin):
    body = "for _ in range(100_000):\n    print('a long line of data')"
    with started(tmp_path, toy_plugin("toy", adding(body)), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_error(tmp_path, toy_plugin):
    with Path("/dev/full").open("w") as full, started(tmp_path, toy_plugin("toy", adding("print('data')")), stdout=full) as process:
        assert process.wait(timeout=30) == 1
        assert process.stderr.read() == "error: no space left on the device\n\nhint: free some space, then run it again\n"


SHOW = """
block = {"event": "block", "stage": "quantize", "count": 22, "rss_bytes": 1.2e9}
events = [
    {"event": "stage", "name": "quantize", "state": "start"},
    {**block, "index": 3, "name": "layers.2", "error": 0.00123, "seconds_left": 12.2},
    {**block, "index": 4, "name": "layers.3", "error": None, "seconds_left": 0},
    {"event": "warning", "text": "layer `x` is dead"},
    {"event": "note", "text": "by the way"},
    {"event": "stage", "name": "quantize", "state": "end", "seconds": 75, "peak_rss_bytes": 1.3e9},
]
for event in events:
    app.output.progress(event)
app.output.table(("layer", "error"), (("a", "0.5"), ("long name", "0.25")), title="errors", right=("error",))
app.output.json({"drop": float("nan"), "name": "µ"})
"""
TABLE = """\
errors

layer      error
a            0.5
long name   0.25
{
  "drop": null,
  "name": "µ"
}
"""


def test_in_a_pipe_progress_is_plain_lines_and_a_table_plain_columns(qhub, toy_plugin):
    assert qhub("toy", env=toy_plugin("toy", adding(SHOW))) == (
        0,
        TABLE,
        "quantize  …\n"
        "quantize  block 3/22  error 0.0012  12 s left  1.2 GB\n"
        "quantize  block 4/22  0.0 s left  1.2 GB\n"
        "warning: layer `x` is dead\n"
        "by the way\n"
        "quantize  1 min 15 s  peak 1.3 GB\n",
    )


def on_terminal(tmp_path, env):
    """What `qhub toy` writes when stdout and stderr are a terminal."""
    main, child = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **env}
    with subprocess.Popen([sys.executable, "-m", "qhub", "toy"], cwd=tmp_path, env=variables, stdout=child, stderr=child) as process:
        os.close(child)
        written = b"".join(terminal_output(main))
    os.close(main)
    return process.returncode, written.decode()


def test_on_a_terminal_progress_is_one_live_line_that_other_text_never_joins(tmp_path, toy_plugin):
    code, text = on_terminal(tmp_path, {**toy_plugin("toy", adding(SHOW)), "NO_COLOR": "1"})
    assert code == 0
    assert text.startswith(
        "\r\x1b[Kquantize  …"
        "\r\x1b[Kquantize  block 3/22  error 0.0012  12 s left  1.2 GB"
        "\r\x1b[Kquantize  block 4/22  0.0 s left  1.2 GB"
        "\r\x1b[Kwarning: layer `x` is dead\r\n"
        "by the way\r\n"
        "quantize  1 min 15 s  peak 1.3 GB\r\n"
    )


@pytest.mark.parametrize("no_color", ["", "1"], ids=["colour", "NO_COLOR"])
def test_colour_only_where_it_is_wanted(tmp_path, toy_plugin, no_color):
    env = toy_plugin("toy", adding("from qhub import QhubError\nraise QhubError('broke', hint='mend')"))
    _, text = on_terminal(tmp_path, {**env, "NO_COLOR": no_color})
    plain = "error: broke\r\n\r\nhint: mend\r\n"
    coloured = "\x1b[31;1merror\x1b[0m: broke\r\n\r\n\x1b[36mhint\x1b[0m: mend\r\n"
    assert text == (plain if no_color else coloured)


REPORT = {
    "recipe_digest": "abc", "model": "demo:llm", "target": "host", "host": "a machine", "method": "awq", "scheme": "w4a16-g128-asym",
    "metric": "next_token_accuracy", "float": {"bytes": 6_000_000, "accuracy": 0.5, "perplexity": 10.0},
    "quantized": {"bytes": 2_000_000, "bits_per_weight": 4.25, "accuracy": 0.48, "perplexity": 10.25, "drop_pct": 4.0},
    "targets": {"max_drop_pct": 2.0, "met": False}, "stages": [{"name": "quantize", "seconds": 12.3, "peak_rss_bytes": 300_000_000}],
    "warnings": ["little data"], "not_checked": ["vLLM"],
}  # fmt: skip
SHOWN = """\
demo:llm → host, w4a16-g128-asym

                       float      awq
size                    6 MB     2 MB
bits per weight            –     4.25
next-token accuracy  50.00 %  48.00 %
perplexity                10    10.25
accuracy drop              –   4.00 %
drop ≤ 2 %                 –       no

stages

stage     time  peak memory
quantize  12 s       300 MB

targets not met: accuracy drop 4.00 % (at most 2 %), 3.0 times smaller
not checked: vLLM
"""


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
    return tmp_path / "run"


def test_report_shows_what_a_run_found(qhub, run_dir):
    assert qhub("report", run_dir) == (0, SHOWN, "warning: little data\n")


def test_report_as_json_is_one_document_and_nothing_else(qhub, run_dir):
    ran = qhub("report", run_dir, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert {name: found[name] for name in ("model", "float", "targets")} == {name: REPORT[name] for name in ("model", "float", "targets")}


def test_report_writes_a_page(qhub, run_dir, tmp_path):
    assert qhub("report", "run", "--html", "page.html") == (0, SHOWN, "warning: little data\nwrote page.html\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_that_cannot_be_written_is_an_error(qhub, run_dir):
    stderr = "error: `gone/page.html`: no such file or directory\n\nhint: check the path and its permissions\n"
    assert qhub("report", "run", "--html", "gone/page.html") == (1, "", stderr)


def test_report_of_something_else_is_an_error(qhub, tmp_path):
    (tmp_path / "run").mkdir()
    message = "`run` has no report.json: it is not a run, or the run did not finish"
    assert qhub("report", "run") == (1, "", f"error: {message}\n\nhint: give the directory that `qhub run` named at its end\n")
