"""What an environment's interpreter answers: JSON on stdout, or an error and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from toy_whole import ROOT, write_toy

from qhub import worker
from qhub.errors import PluginError
from qhub.isolation.environments import environment
from qhub.isolation.proxies import ApartExporter, ApartQuantizer, ApartRuntime, proxy
from qhub.types import ModelProfile, Scheme, Target, as_json

OTHERS = """
from qhub import Exporter, Runtime, hookimpl

class Folder(Exporter):
    name = "folder"
    format = "folder-1"
    def reject(self, profile, scheme):
        return "only eight bits" if scheme.weight_bits != 8 else None

class Engine(Runtime):
    name = "engine"
    formats = ("folder-1",)
    def reject(self, target):
        return "needs an M1" if target.name != "apple-m1" else None

@hookimpl
def qhub_exporters():
    return [Folder()]

@hookimpl
def qhub_runtimes():
    return [Engine()]
"""


@pytest.fixture
def ask(tmp_path):
    """Ask a worker whose environment has the toy."""
    folder = write_toy(tmp_path / "packages")

    def run(*arguments: str, question: object = None):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "QHUB_PLUGINS": "toy"}
        command = [sys.executable, "-m", "qhub.worker", *arguments]
        return subprocess.run(command, env=env, input=json.dumps(question), capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def others(toy_plugin, monkeypatch):
    """A plugin with an exporter and a runtime, and its declarations."""
    monkeypatch.syspath_prepend(toy_plugin("others", OTHERS)["PYTHONPATH"].split(os.pathsep)[1])
    said = worker.declare("others")
    return {one["kind"]: one for one in json.loads(json.dumps(as_json(said)))["components"]}


def test_packages_are_versions_by_distribution(ask):
    ran = ask("packages")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert found["packages"]["qhub-toy"] == "1.5"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_declaration_says_all_that_a_route_asks_for(ask):
    ran = ask("declare", "toy")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert (said["distribution"], said["version"], list(said["tools"])) == ("qhub-toy", "1.5", ["numpy"])
    (toy,) = said["components"]
    assert {key: toy[key] for key in ("name", "kind", "family", "default_scheme", "needs", "scales", "whole", "options", "requires")} == {
        "name": "toy-whole", "kind": "quantizer", "family": "weight-only", "default_scheme": "w4a16-g128-asym", "needs": ["tokens"],
        "scales": False, "whole": True, "options": {"bias": 0}, "requires": [],
    }  # fmt: skip
    assert "w3a16-g64-sym" in toy["schemes"]
    assert toy["refused"]["w8a8-static"] == "`toy-whole` does not write scheme `w8a8-static`"
    assert toy["tasks"] == {}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "error: a worker is asked `packages`, `declare NAME` or `reject`\n"),
        (["declare"], 2, "error: a worker is asked `packages`, `declare NAME` or `reject`\n"),
        (["declare", "other"], 4, "error: no plugin `other` was installed\n\nhint: found: "),
    ],
    ids=["nothing asked", "no name", "unknown plugin"],
)
def test_what_cannot_be_answered_is_an_error(ask, arguments, code, message):
    ran = ask(*arguments)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr.startswith(message)


@pytest.mark.parametrize(
    ("architecture", "reason"), [("LlamaForCausalLM", None), ("ToyForCausalLM", "`toy-whole` does not take `ToyForCausalLM`")]
)
def test_a_model_is_judged_by_the_method_itself(ask, architecture, reason):
    profile = ModelProfile("m", "/m", "llm", architecture, 5, "bf16", 10)
    ran = ask("reject", question={"method": "toy-whole", "profile": as_json(profile), "scheme": "w4a16-g32-asym"})
    assert json.loads(ran.stdout) == {"reason": reason}, ran.stderr


def test_a_plugin_whose_modules_are_missing_is_not_declared(toy_plugin, monkeypatch):
    source = OTHERS.replace('name = "folder"', 'name = "folder"\n    requires = ("no_such_module",)')
    monkeypatch.syspath_prepend(toy_plugin("lacking", source)["PYTHONPATH"].split(os.pathsep)[1])
    monkeypatch.delitem(sys.modules, "qhub_toy_lacking", raising=False)
    with pytest.raises(PluginError, match="plugin `lacking` needs `no_such_module`, which cannot be imported there"):
        worker.declare("lacking")


def test_formats_and_engines_are_declared_too(others):
    assert others["exporter"]["format"] == "folder-1"
    grids = [str(Scheme(8, 16, group, symmetric)) for group in (None, 16, 32, 64, 128, 256) for symmetric in (True, False)]
    assert others["exporter"]["schemes"] == [*grids, "w8a8-static", "w8a8-dynamic"]
    assert others["exporter"]["refused"]["w4a16-g128-asym"] == "only eight bits"
    assert others["runtime"]["formats"] == ["folder-1"]
    assert "apple-m1" not in others["runtime"]["targets"]
    assert others["runtime"]["targets"]["host"] == "needs an M1"


def test_a_stand_in_answers_as_the_component_does(others, tmp_path, monkeypatch):
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path))
    home = environment("others")
    exporter, runtime = proxy(home, others["exporter"]), proxy(home, others["runtime"])
    assert isinstance(exporter, ApartExporter)
    assert isinstance(runtime, ApartRuntime)
    assert not isinstance(exporter, ApartQuantizer)
    profile = ModelProfile("m", "", "llm", "Any", 1, "bf16", 1)
    assert exporter.format == "folder-1"
    assert exporter.reject(profile, Scheme.parse("w4a16-g128-asym")) == "only eight bits"
    assert exporter.reject(profile, Scheme.parse("w8a16")) is None
    assert exporter.reject(profile, Scheme(4, 16, 8)) == "`folder` did not say that it takes scheme `w4a16-g8-sym`"
    assert runtime.formats == ("folder-1",)
    assert runtime.reject(Target("apple-m1", "", "macos", "aarch64")) is None
    assert runtime.reject(Target("host", "", "linux", "x86_64")) == "needs an M1"
    with pytest.raises(PluginError, match=r"`engine` lives in the environment `others`, so `.*` cannot be opened in this process"):
        runtime.open(tmp_path)
