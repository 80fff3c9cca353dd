"""`registry.yaml` is complete, and targets are found by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qhub.errors import QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.registry import find_target, load_registry
from qhub.types import Scheme, Target

ROOT = Path(__file__).parent.parent
FIRST_SET = {
    "apple-m1", "raspberry-pi-5", "jetson-orin-nano", "intel-cpu-avx2", "intel-cpu-avx-vnni", "intel-cpu-avx512-vnni",
    "intel-cpu-amx", "nvidia-ampere", "nvidia-ada", "nvidia-hopper",
}  # fmt: skip
REGISTRY = load_registry()


def toy_target(name="toy", **facts):
    return Target(name=name, summary="a toy", **{"os": "linux", "arch": "x86_64"} | facts)


def test_the_first_set_of_devices_is_there():
    assert set(REGISTRY.targets) >= FIRST_SET


@pytest.mark.parametrize("name", REGISTRY.targets)
def test_every_device_is_complete_and_every_number_has_its_source(name):
    target, facts = REGISTRY.targets[name], REGISTRY.facts[name]
    assert target.name == name
    assert target.summary
    assert target.os in ("linux", "macos", "windows", "ios", "android", "none")
    assert target.isa or target.accelerators, "nothing says what it computes with"
    assert {"memory_bytes", "usable_memory_bytes", "bandwidth_bytes_per_s", "int8_ops_per_s", "fp16_flops_per_s"} <= set(facts)
    for key, fact in facts.items():
        assert fact.value > 0, key
        assert fact.source, key
        assert fact.date[:2] == "20", key
        stored = getattr(target, key)
        assert (stored.value if hasattr(stored, "value") else stored) == fact.value


@pytest.mark.parametrize("name", REGISTRY.targets)
def test_what_is_usable_is_less_than_there_is(name):
    target = REGISTRY.targets[name]
    assert 0 < target.usable_memory_bytes < target.memory_bytes


@pytest.mark.parametrize("name", REGISTRY.targets)
def test_every_device_has_a_plugin_that_finishes_language_and_vision_models(name):
    assert REGISTRY.finishers(REGISTRY.targets[name], "llm")
    assert REGISTRY.finishers(REGISTRY.targets[name], "vision")


@pytest.mark.parametrize("name", REGISTRY.index)
def test_every_known_plugin_says_what_it_offers(name):
    entry = REGISTRY.index[name]
    assert entry.distribution == f"qhub-{name}"
    assert entry.summary
    assert set(entry.kinds) <= {"quantizer", "exporter", "runtime", "models"}
    assert bool(entry.families) == ("quantizer" in entry.kinds) == bool(entry.schemes)
    assert bool(entry.formats) == ("exporter" in entry.kinds)
    for scheme in entry.schemes:
        assert str(Scheme.parse(scheme)) == scheme


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.index.items() if entry.available == "repository"])
def test_a_plugin_said_to_be_in_this_repository_is_there(name):
    if not (ROOT / "plugins" / name / "pyproject.toml").exists():
        pytest.skip(f"plugins/{name} is not written yet")
    assert f'name = "qhub-{name}"' in (ROOT / "plugins" / name / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.index.items() if entry.is_planned])
def test_a_planned_plugin_is_not_in_this_repository(name):
    assert not (ROOT / "plugins" / name).exists(), "it is written: change `available` in registry.yaml"


# What people use where; the first is what a route on that device misses first.
@pytest.mark.parametrize(
    ("target", "task", "first"),
    [
        ("apple-m1", "llm", "mlx"),
        ("apple-m1", "vision", "coreml"),
        ("raspberry-pi-5", "llm", "gguf"),
        ("jetson-orin-nano", "vision", "tensorrt"),
        ("intel-cpu-avx2", "llm", "hf"),
        ("intel-cpu-amx", "vision", "openvino"),
        ("nvidia-hopper", "llm", "hf"),
    ],
)
def test_the_best_finisher_comes_first(target, task, first):
    assert REGISTRY.finishers(REGISTRY.targets[target], task)[0].name == first


def test_cpu_engines_do_not_finish_a_route_to_a_graphics_card():
    names = {entry.name for entry in REGISTRY.finishers(REGISTRY.targets["nvidia-ada"], "llm")}
    assert names & {"native", "openvino"} == set()


def test_a_target_is_found_in_the_registry_and_in_plugins():
    plugins = Plugins.load([])
    plugins.__dict__["targets"] = {"toy": toy_target()}
    assert find_target("apple-m1", plugins) == REGISTRY.targets["apple-m1"]
    assert find_target("toy", plugins).name == "toy"
    assert find_target("host", plugins).name == "host"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("aple-m1", "did you mean `apple-m1`? `qhub targets` lists them all"),
        ("hots", "did you mean `host`? `qhub targets` lists them all"),
        ("zx81", "`qhub targets` lists the known ones"),
    ],
)
def test_an_unknown_target_is_an_error_with_the_nearest(name, hint):
    with pytest.raises(UsageError, match=f"unknown target `{name}`") as caught:
        find_target(name, Plugins.load([]))
    assert caught.value.hint == hint


# Ways in which a registry can be wrong.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets: [", "is not a valid registry"),
        ("targets: {}", "is not a valid registry: 'plugins'"),
        ("targets: {x: {os: linux, arch: x, summary: x, memory: 3}}\nplugins: {}", "`x` has the unknown key `memory`"),
        ("targets: {x: {os: linux, arch: x, summary: x, cores: 3}}\nplugins: {}", "is not a valid registry"),
        (
            "targets: {}\nplugins: {x: {distribution: x, kinds: [], summary: x, status: dead, available: pypi}}",
            "plugin `x` has status `dead`",
        ),
        (
            "targets: {}\nplugins: {x: {distribution: x, kinds: [], summary: x, status: active, available: pypi, finishes: [{cpu: [x]}]}}",
            "`x` has the unknown key `cpu`",
        ),
    ],
)
def test_a_wrong_registry_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QhubError) as caught:
        load_registry(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_the_wheel_holds_the_registry(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "registry.yaml"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "qhub", source / "qhub", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "README.md").write_text("qhub\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("qhub_core-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("qhub/registry.yaml") == (ROOT / "registry.yaml").read_bytes()
