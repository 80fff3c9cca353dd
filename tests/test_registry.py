"""`registry.yaml` is complete, and targets are found by name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path
from typing import get_args

import pytest

from qhub.errors import QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.registry import Condition, IndexEntry, find_target, load_registry
from qhub.route.usercache import cache_path
from qhub.types import Scheme, Target, Task

ROOT = Path(__file__).parent.parent
#: Devices that people ask for; another plugin, a test or a run may name any of them.
NAMES = {
    "apple-m1", "apple-m2", "apple-m3", "apple-m4", "ios", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano",
    "jetson-agx-orin", "intel-cpu-avx2", "intel-cpu-avx-vnni", "intel-cpu-avx512-vnni", "intel-cpu-amx", "ai-pc", "ai-pc-gpu",
    "ai-pc-npu", "ryzen-ai", "amd-cpu-zen4", "amd-cpu-zen5", "arm-cpu", "nvidia-turing", "nvidia-ampere", "nvidia-a100",
    "nvidia-ada", "nvidia-hopper", "nvidia-blackwell", "android", "mobile-gpu", "hexagon", "tpu", "edge-tpu", "cortex-m4",
    "cortex-m7", "cortex-m55",
}  # fmt: skip
NUMBERS = {"memory_bytes", "usable_memory_bytes", "bandwidth_bytes_per_s", "int8_ops_per_s", "fp16_flops_per_s"}
#: Accelerators are matched by prefix, so each has one spelling.
ACCELERATORS = (
    "cuda-", "metal", "ane", "gpu-intel", "gpu-amd", "gpu-mobile", "npu-intel", "npu-xdna", "hexagon-v", "tpu-v", "edgetpu", "ethos-u",
)  # fmt: skip
REGISTRY = load_registry()


def targets_of(entry: IndexEntry) -> tuple[str, ...]:
    """The devices for which `entry` finishes routes for some task."""
    return tuple(name for name, target in REGISTRY.targets.items() if any(entry.finishes_target(target, task) for task in get_args(Task)))


def toy_target(name="toy", **facts):
    return Target(name=name, summary="a toy", **{"os": "linux", "arch": "x86_64"} | facts)


def test_every_device_that_people_ask_for_is_there():
    assert set(REGISTRY.targets) == NAMES


@pytest.mark.parametrize("name", REGISTRY.targets)
def test_every_device_is_complete_and_every_number_has_its_source(name):
    target, facts = REGISTRY.targets[name], REGISTRY.facts[name]
    assert target.name == name
    assert target.summary
    assert target.os in ("linux", "macos", "windows", "ios", "android", "none")
    assert target.arch in ("x86_64", "aarch64", "armv7m", "armv8m")
    assert target.vendor in ("intel", "amd", "arm", "apple") or not target.isa, "nothing says whose CPU it is"
    assert target.isa or target.accelerators, "nothing says what it computes with"
    assert all(accelerator.startswith(ACCELERATORS) for accelerator in target.accelerators)
    for key in NUMBERS - set(facts):
        assert any(note.startswith(f"{key}: ") for note in target.notes), f"no note says why there is no {key}"
    for key, fact in facts.items():
        assert len(fact.source) > 10, key
        assert date(2018, 1, 1) <= date.fromisoformat(fact.date) <= date(2027, 1, 1), key
        stored = getattr(target, key)
        assert (stored.value if hasattr(stored, "value") else stored) == fact.value


# What no device of today is beyond: a wrong power of ten would be.
@pytest.mark.parametrize("name", REGISTRY.targets)
def test_every_number_is_physically_possible(name):
    target = REGISTRY.targets[name]
    bandwidth = target.bandwidth_bytes_per_s.value
    fp16 = target.fp16_flops_per_s.value if target.fp16_flops_per_s else None
    assert 0 < target.usable_memory_bytes < target.memory_bytes <= 1 << 40
    assert 1 <= (target.cores or 1) <= 256
    assert 1e8 <= bandwidth <= 1e13
    assert 1e8 <= target.int8_ops_per_s.value <= 1e16
    assert fp16 is None or 0.1 <= target.int8_ops_per_s.value / fp16 <= 70, "int8 and fp16 rates are not of one machine"
    assert 0.5 <= target.int8_ops_per_s.value / bandwidth <= 2000, "operations per byte"
    if target.os == "none":
        assert target.memory_bytes <= 1 << 24
        assert 1 << 19 <= target.flash_bytes <= 1 << 24
    else:
        assert target.memory_bytes >= 1 << 30
        assert target.flash_bytes is None


CHANNELS, BUS = re.compile(r"(\d+) channels of DDR\d-(\d+)"), re.compile(r"(\d+)-bit LPDDR\dX?-(\d+)")
DERIVED = {
    name: CHANNELS.search(fact.source) or BUS.search(fact.source)
    for name, fact in ((name, target.bandwidth_bytes_per_s) for name, target in REGISTRY.targets.items())
}


@pytest.mark.parametrize("name", [name for name, parts in DERIVED.items() if parts])
def test_a_bandwidth_that_is_derived_is_what_its_parts_give(name):
    parts = DERIVED[name]
    width_bytes = int(parts[1]) * 8 if parts.re is CHANNELS else int(parts[1]) / 8
    assert REGISTRY.targets[name].bandwidth_bytes_per_s.value == pytest.approx(width_bytes * int(parts[2]) * 1e6, rel=0.005)


@pytest.mark.parametrize("alias", REGISTRY.aliases)
def test_every_alias_is_another_word_for_a_device(alias):
    assert alias not in {*REGISTRY.targets, "host"}
    found = find_target(alias, Plugins.load([]), REGISTRY)
    assert found is REGISTRY.targets[REGISTRY.aliases[alias]]
    assert alias in REGISTRY.aliases_of(found.name)


def test_the_words_that_tables_of_hardware_use_mean_a_device():
    assert {"nvidia", "intel-cpu", "amd-cpu", "apple-silicon", "cortex-m"} <= set(REGISTRY.aliases)


def test_a_plugins_device_is_preferred_to_an_alias():
    plugins = Plugins.load([])
    plugins.__dict__["targets"] = {"nvidia": toy_target("nvidia")}
    assert find_target("nvidia", plugins, REGISTRY).summary == "a toy"


@pytest.mark.parametrize("name", REGISTRY.index)
def test_every_known_plugin_says_what_it_offers(name):
    entry = REGISTRY.index[name]
    assert entry.distribution == (name if entry.available == "none" else f"qhub-{name}")
    assert entry.summary
    assert set(entry.kinds) <= {"quantizer", "exporter", "runtime", "models"}
    assert bool(entry.families) == ("quantizer" in entry.kinds) == bool(entry.schemes)
    assert entry.formats or "exporter" not in entry.kinds
    assert not entry.formats or {"exporter", "runtime"} & set(entry.kinds)
    for scheme in entry.schemes:
        assert str(Scheme.parse(scheme)) == scheme


# Tools that people know and that are gone, and what stands for them.
@pytest.mark.parametrize(
    ("tool", "instead"), [("auto-gptq", "gptq"), ("autoawq", "awq"), ("neural-speed", "native"), ("ipex-llm", "openvino")]
)
def test_an_archived_tool_says_what_replaces_it_and_is_never_offered(tool, instead):
    entry = REGISTRY.index[tool]
    assert (entry.status, entry.replaced_by) == ("archived", instead)
    assert not entry.is_offered
    assert targets_of(entry) == ()


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.index.items() if entry.status != "active" or entry.available == "none"])
def test_what_is_not_offered_names_what_is_and_how_that_is_known(name):
    entry = REGISTRY.index[name]
    assert REGISTRY.index[entry.replaced_by].is_offered
    assert entry.status_source or entry.status == "active"


@pytest.mark.parametrize("status", ["archived", "active"])
def test_an_archived_plugin_finishes_nothing_whatever_it_says(tmp_path, status):
    row = (
        f"{{distribution: x, kinds: [exporter], formats: [x], summary: x, status: {status}, available: pypi, finishes: [{{os: [linux]}}]}}"
    )
    path = tmp_path / "registry.yaml"
    path.write_text(f"targets: {{}}\nplugins: {{x: {row}}}", encoding="utf-8")
    found = [entry.name for entry in load_registry(path).finishers(toy_target(), "llm")]
    assert found == ([] if status == "archived" else ["x"])


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.index.items() if entry.available == "repository"])
def test_a_plugin_said_to_be_in_this_repository_is_there(name):
    if not (ROOT / "plugins" / name / "pyproject.toml").exists():
        pytest.skip(f"plugins/{name} is not written yet")
    assert f'name = "qhub-{name}"' in (ROOT / "plugins" / name / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.index.items() if entry.is_planned])
def test_a_planned_plugin_is_not_in_this_repository(name):
    assert not (ROOT / "plugins" / name).exists(), "it is written: change `available` in registry.yaml"


# What people use where, best first. "–": nothing that is known finishes such a model there.
@pytest.mark.parametrize(
    ("targets", "llm", "vision", "speech"),
    [
        ("apple-m1 apple-m2 apple-m3 apple-m4 ios", "mlx gguf", "coreml onnxruntime", "coreml onnxruntime"),
        ("raspberry-pi-4 raspberry-pi-5 arm-cpu", "gguf native onnxruntime", "onnxruntime tflite", "onnxruntime tflite"),
        ("jetson-orin-nano jetson-agx-orin", "gguf tensorrt", "tensorrt onnxruntime", "tensorrt onnxruntime"),
        ("intel-cpu-avx2 intel-cpu-avx-vnni intel-cpu-avx512-vnni intel-cpu-amx", "openvino gguf native onnxruntime hf",
         "openvino onnxruntime", "openvino onnxruntime"),
        ("ai-pc", "openvino gguf onnxruntime hf", "openvino onnxruntime", "openvino onnxruntime"),
        ("ai-pc-gpu", "openvino gguf", "openvino onnxruntime", "openvino onnxruntime"),
        ("ai-pc-npu", "openvino", "openvino onnxruntime", "openvino onnxruntime"),
        ("amd-cpu-zen4 amd-cpu-zen5", "gguf native onnxruntime hf openvino", "onnxruntime openvino", "onnxruntime openvino"),
        ("ryzen-ai", "onnxruntime", "onnxruntime", "onnxruntime"),
        ("nvidia-turing nvidia-ampere nvidia-a100 nvidia-ada nvidia-hopper nvidia-blackwell", "hf gguf",
         "tensorrt onnxruntime", "tensorrt onnxruntime"),
        ("android", "tflite gguf", "tflite onnxruntime", "tflite onnxruntime"),
        ("mobile-gpu", "tflite gguf", "tflite", "tflite"),
        ("hexagon", "onnxruntime tflite gguf", "onnxruntime tflite", "onnxruntime tflite"),
        ("tpu", "hf", "–", "–"),
        ("edge-tpu cortex-m4 cortex-m7 cortex-m55", "–", "tflite", "tflite"),
    ],
)  # fmt: skip
def test_what_people_use_on_a_device_comes_first(targets, llm, vision, speech):
    for name in targets.split():
        found = [[entry.name for entry in REGISTRY.finishers(REGISTRY.targets[name], task)] for task in ("llm", "vision", "speech")]
        assert [" ".join(names) or "–" for names in found] == [llm, vision, speech], name


def test_every_device_is_in_the_table_of_what_people_use():
    (mark,) = [mark for mark in test_what_people_use_on_a_device_comes_first.pytestmark if mark.name == "parametrize"]
    assert {name for row in mark.args[1] for name in row[0].split()} == set(REGISTRY.targets)


# A machine with a CPU and more: what runs on the CPU stays possible, what runs on the accelerator is possible too.
@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ({"isa": ("avx2",), "vendor": "intel", "accelerators": ("gpu-intel", "npu-intel")}, "openvino gguf native onnxruntime hf"),
        ({"isa": ("avx2",), "vendor": "amd", "accelerators": ("npu-xdna2",)}, "onnxruntime gguf native hf openvino"),
        ({"isa": ("avx2",), "vendor": "intel", "accelerators": ("cuda-8.9",)}, "hf gguf"),
        ({"isa": ("avx",), "vendor": "intel"}, "gguf onnxruntime hf"),
        ({"isa": ("avx2",), "os": "windows"}, "gguf onnxruntime hf openvino"),
    ],
    ids=["Intel laptop with NPU", "AMD laptop with NPU", "PC with a graphics card", "no AVX2", "unknown CPU"],
)
def test_a_machine_of_several_processors_uses_any_of_them(facts, names):
    assert " ".join(entry.name for entry in REGISTRY.finishers(toy_target(**facts), "llm")) == names


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
        ("targets: {}\naliases: {y: x}\nplugins: {}", "alias `y` of `x`: the first must not be a target, the second must be one"),
        ("targets: {x: {os: linux, arch: x, summary: x}}\naliases: {x: x}\nplugins: {}", "alias `x` of `x`"),
        ("[1, 2]", "is not a valid registry"),
    ],
)
def test_a_wrong_registry_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QhubError) as caught:
        load_registry(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


# What a condition says, and whether a Linux PC with these facts meets it for a language model.
@pytest.mark.parametrize(
    ("allowed", "facts", "holds"),
    [
        ({}, {}, True),
        ({"os": ("windows", "linux")}, {}, True),
        ({"os": ("windows",)}, {}, False),
        ({"tasks": ("vision",)}, {}, False),
        ({"vendor": ("intel",)}, {"vendor": "amd"}, False),
        ({"vendor": ("intel",)}, {"vendor": "intel"}, True),
        ({"isa": ("avx2", "neon")}, {"isa": ("avx2", "fma")}, True),
        ({"isa": ("avx2",)}, {}, False),
        ({"accelerators": ("cuda",)}, {"accelerators": ("cuda-8.9",)}, True),
        ({"accelerators": ("cuda-9",)}, {"accelerators": ("cuda-8.9",)}, False),
        ({"without": ("cuda",)}, {"accelerators": ("cuda-8.9",)}, False),
        ({"without": ("cuda",)}, {"accelerators": ("gpu-intel",)}, True),
        ({"os": ("linux",), "isa": ("avx",), "without": ("cuda",)}, {"isa": ("avx",), "accelerators": ("cuda-7.5",)}, False),
    ],
)
def test_all_that_a_condition_names_must_hold(allowed, facts, holds):
    assert Condition(allowed).holds(toy_target(**facts), "llm") == holds


def test_the_best_place_of_the_conditions_that_hold_counts():
    conditions = (Condition({"os": ("linux",)}, 3), Condition({"isa": ("avx2",)}, 1), Condition({"arch": ("aarch64",)}, 0))
    entry = IndexEntry("toy", "qhub-toy", ("runtime",), "a toy", finishes=conditions)
    assert entry.place_on(toy_target(isa=("avx2",)), "llm") == 1
    assert entry.place_on(toy_target(), "llm") == 3
    assert entry.place_on(toy_target(os="macos"), "llm") is None


def test_an_index_entry_knows_the_devices_it_is_for():
    assert targets_of(REGISTRY.index["mlx"]) == ("apple-m1", "apple-m2", "apple-m3", "apple-m4", "ios")
    assert "cortex-m4" in targets_of(REGISTRY.index["tflite"])
    assert targets_of(REGISTRY.index["awq"]) == (), "a quantizer works for every device and finishes nothing"


def test_the_parsed_registry_is_kept_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_registry()
    kept = json.loads(cache_path("registry.json").read_text(encoding="utf-8"))
    kept["data"]["targets"] = {"apple-m1": kept["data"]["targets"]["apple-m1"]}
    kept["data"]["aliases"] = {}
    cache_path("registry.json").write_text(json.dumps(kept), encoding="utf-8")
    assert first == REGISTRY
    assert list(load_registry().targets) == ["apple-m1"], "the cache was not read"


def _another_version(kept):
    return {**kept, "made_from": ["0.0.0", *kept["made_from"][1:]]}


def _another_file(kept):
    return {**kept, "made_from": [kept["made_from"][0], "/elsewhere/registry.yaml", *kept["made_from"][2:]]}


def _changed_since(kept):
    return {**kept, "made_from": [*kept["made_from"][:3], kept["made_from"][3] - 1]}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda _: "[]",
        lambda kept: json.dumps(kept)[:-999],
        lambda kept: json.dumps({**kept, "data": None}),
        lambda kept: json.dumps({**kept, "data": {"targets": {"x": {}}, "plugins": {}}}),
        lambda kept: json.dumps(_another_version({**kept, "data": {"targets": {}, "plugins": {}}})),
        lambda kept: json.dumps(_another_file({**kept, "data": {"targets": {}, "plugins": {}}})),
        lambda kept: json.dumps(_changed_since({**kept, "data": {"targets": {}, "plugins": {}}})),
    ],
    ids=["empty", "a list", "cut off", "no data", "a row that is wrong", "another version", "another file", "a file changed since"],
)
def test_a_cache_that_is_spoilt_or_old_is_not_used_and_is_made_again(monkeypatch, tmp_path, spoil):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_registry()
    kept = cache_path("registry.json").read_text(encoding="utf-8")
    cache_path("registry.json").write_text(spoil(json.loads(kept)), encoding="utf-8")
    assert load_registry() == REGISTRY
    assert cache_path("registry.json").read_text(encoding="utf-8") == kept


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "qhub").write_text("a file where the folder should be", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_registry() == REGISTRY


def test_a_cached_registry_needs_no_yaml(monkeypatch, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = "import sys; from qhub.route.registry import load_registry; load_registry(); print('yaml' in sys.modules)"
    said = [
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout for _ in "12"
    ]
    assert said == ["True\n", "False\n"]


def test_the_wheel_holds_the_registry(tmp_path):
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:  # not imported: it minds who imported distutils before
        pytest.skip("setuptools 77 is not here")
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
