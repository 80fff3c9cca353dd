"""Plugins that misbehave, as real distributions in processes of their own: what docs/plugins.md says happens, and the hub is unharmed."""

from __future__ import annotations

import json
import shutil

import pytest
from forked import needs_plugins, run
from tiny_models import tiny_model

GOOD = """
from qhub import Quantizer, hookimpl

class Nearest(Quantizer):
    name = "nearest"
    summary = "round to nearest"
    distribution = "qhub-good"

    def quantize_layer(self, weight, scheme, block):
        from qhub import quantize_rtn

        return quantize_rtn(weight, scheme, block.dtype)

@hookimpl
def qhub_quantizers():
    return [Nearest()]
"""
BAD = GOOD.replace('"nearest"', '"bad"').replace("qhub-good", "qhub-bad")
RUN = ("run", "model", "--scheme", "w4a16-g32-asym", "--calib", "text.txt", "--eval", "text.txt", "--samples", "4", "--seq-len", "32")


@pytest.fixture
def here(tmp_path):
    """A folder with a tiny model and a text."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    (folder / "text.txt").write_text("the cat sat on the mat; " * 200, encoding="utf-8")
    return folder


def states(ran):
    return {row["name"]: row["state"] for row in json.loads(ran.out)["plugins"]}


# One that cannot be loaded, or fails when its hook is called: left out with one warning, listed as broken, the other works.
UNLOADABLE = {
    "an import that fails": ("import no_such_sdk", "was left out: ModuleNotFoundError: No module named 'no_such_sdk'"),
    "a syntax error": ("def broken(:", "was left out: SyntaxError: invalid syntax (qhub_toy_bad.py, line 1)"),
    "an exit": ("raise SystemExit(3)", "was left out: SystemExit: 3"),
    "an error of its own": ("raise RuntimeError('no licence')", "was left out: RuntimeError: no licence"),
    "a network that is not there": (
        "import socket\nraise OSError('[Errno -2] Name or service not known')",
        "was left out: OSError: [Errno -2] Name or service not known",
    ),
    "a crash in its hook": (
        BAD.replace("return [Nearest()]", "return 1 / 0"),
        "failed in `qhub_quantizers`: ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize(("source", "why"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_plugin_that_cannot_be_used_is_one_warning_and_the_others_work(qhub, toy_plugin, llama, source, why):
    toy_plugin("bad", source)
    env, folder = toy_plugin("good", GOOD), llama()
    ran = qhub("recommend", folder, "--target", "apple-m1", "--json", env=env)
    assert (ran.code, ran.err) == (0, f"warning: plugin `bad` of `qhub-bad` {why}\n")
    assert [route["method"] for route in json.loads(ran.out)["routes"]] == ["nearest"]
    found = states(qhub("plugins", "--json", env=env))
    assert found["bad"].startswith("broken: ")
    assert found["good"] == "usable"
    ran = qhub("recommend", folder, "--plugin", "bad", env=env)
    assert (ran.code, ran.out) == (4, "")
    assert "error: plugin `bad` of `qhub-bad` " in ran.err
    assert "Traceback" not in ran.err
    quiet = qhub("recommend", folder, "--target", "apple-m1", env={**env, "QHUB_DISABLED_PLUGINS": "bad"})
    assert (quiet.code, quiet.err) == (0, "")


def test_a_plugin_that_takes_long_to_import_is_named_with_the_seconds_and_the_way_to_go_without_it(qhub, toy_plugin):
    env = toy_plugin("bad", f"import time\ntime.sleep(5)\n{BAD}")
    ran = qhub("plugins", "--json", env=env)
    assert (ran.code, states(ran)) == (0, {"bad": "usable"})
    start, _, end = ran.err.partition(" took ")
    assert start == "warning: plugin `bad` of `qhub-bad`"
    seconds, _, hint = end.partition(" s to import; ")
    assert 5 <= float(seconds) < 30
    assert hint == "`QHUB_DISABLED_PLUGINS=bad` goes without it\n"


def test_a_plugin_that_prints_does_not_spoil_the_data(qhub, toy_plugin):
    ran = qhub("plugins", "--json", env=toy_plugin("bad", f"print('hello')\n{BAD}"))
    assert (ran.code, states(ran), ran.err) == (0, {"bad": "usable"}, "hello\n")


def test_a_crash_in_reject_counts_as_a_refusal_that_says_so(qhub, toy_plugin, llama):
    crash = "\n    def reject(self, profile, scheme):\n        raise KeyError('hidden')\n"
    toy_plugin("bad", BAD.replace('    distribution = "qhub-bad"\n', f'    distribution = "qhub-bad"\n{crash}'))
    env, folder = toy_plugin("good", GOOD), llama()
    ran = qhub("recommend", folder, "--target", "apple-m1", "--json", env=env)
    assert (ran.code, ran.err) == (0, "")
    document = json.loads(ran.out)
    assert [route["method"] for route in document["routes"]] == ["nearest"]
    reasons = {row["reason"] for row in document["rejected"] if ": bad → " in row["route"]}
    assert reasons == {"its plugin failed: KeyError: 'hidden'"}
    ran = qhub("recommend", folder, "--plugin", "bad", "--target", "apple-m1", env=env)
    assert (ran.code, ran.out) == (3, "")
    assert "its plugin failed: KeyError: 'hidden'" in ran.err


def test_two_components_of_one_name_block_routes_until_one_is_disabled(qhub, toy_plugin, llama):
    toy_plugin("good", GOOD)
    env, folder = toy_plugin("thief", GOOD.replace("qhub-good", "qhub-thief")), llama()
    ran = qhub("recommend", folder, "--target", "apple-m1", env=env)
    assert (ran.code, ran.out) == (4, "")
    assert ran.err == (
        "error: two plugins offer `nearest`: `qhub-good` and `qhub-thief`\n\n"
        "hint: disable one: `QHUB_DISABLED_PLUGINS=thief`, or `pip uninstall qhub-thief`\n"
    )
    listed = qhub("plugins", "--json", env=env)
    assert set(states(listed).values()) == {"blocked: two plugins offer `nearest`: `qhub-good` and `qhub-thief`"}
    assert qhub("recommend", folder, "--target", "apple-m1", env={**env, "QHUB_DISABLED_PLUGINS": "thief"}).code == 0


@needs_plugins
def test_a_crash_while_quantizing_is_exit_code_4_and_leaves_nothing(here, toy_plugin):
    env = toy_plugin("bad", BAD.replace("return quantize_rtn(weight, scheme, block.dtype)", "raise ValueError('singular')"))
    env["QHUB_PLUGINS"] += ",hf,rtn"
    ran = run([*RUN, "--plugin", "bad", "--out", "out"], here, env=env)
    assert (ran.code, ran.out) == (4, "")
    assert "error: stage `quantize` failed in `bad`: ValueError: singular\n" in ran.err
    assert "Traceback" not in ran.err
    assert not (here / "out").exists()
    assert run([*RUN, "--plugin", "rtn", "--out", "out"], here, env=env).code in (0, 5)


ENGINE = """
from qhub import Runtime, hookimpl

class Engine(Runtime):
    name = "bad"
    summary = "an engine that does not start"
    distribution = "qhub-bad"
    formats = ("compressed-tensors",)

    def open(self, path, options=None):
        raise OSError(5, "no such accelerator")

@hookimpl
def qhub_runtimes():
    return [Engine()]
"""


@needs_plugins
def test_a_crash_while_opening_is_exit_code_4_and_keeps_the_quantized_model(here, toy_plugin):
    env = toy_plugin("bad", ENGINE.replace('OSError(5, "no such accelerator")', 'RuntimeError("no such accelerator")'))
    env["QHUB_PLUGINS"] += ",hf,rtn"
    ran = run([*RUN, "--plugin", "rtn", "--plugin", "bad", "--out", "out"], here, env=env)
    assert (ran.code, ran.out) == (4, "")
    assert "error: stage `verify` failed in `bad`: RuntimeError: no such accelerator\n" in ran.err
    assert (here / "out" / "quantized" / "config.json").exists()


def test_a_plugin_that_touches_the_network_fails_its_check_which_names_the_address(qhub, toy_plugin):
    source = BAD.replace(
        "    return [Nearest()]",
        "    import urllib.request\n    try:\n        urllib.request.urlopen('http://telemetry.example:8080/ping')\n"
        "    except OSError:\n        pass\n    return [Nearest()]",
    ).replace("    summary =", '    requires = ("no_such_sdk",)\n    summary =')
    env = toy_plugin("bad", source)
    ran = qhub("plugins", "check", "bad", "--json", env=env)
    assert ran.code == 4
    (found,) = [row for row in json.loads(ran.out)["checks"] if row["name"] == "no-network"]
    assert (found["outcome"], found["reason"]) == ("fail", "it tried to reach `telemetry.example:8080`")
    assert ran.err == "checking `bad` of `qhub-bad` in processes of its own\n1 of 12 checks failed\n"
