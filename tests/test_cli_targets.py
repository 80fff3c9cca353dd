"""`qhub targets`: exact output, in processes of their own; and the table in docs/targets.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from qhub.route.registry import load_registry
from qhub.units import human_bytes

ROOT = Path(__file__).parent.parent
REGISTRY = load_registry()
BOARD = """
from qhub import Target, hookimpl

@hookimpl
def qhub_targets():
    return [Target("toy", "a toy device", "linux", "riscv64")]
"""


def test_targets_lists_the_devices(qhub):
    ran = qhub("targets")
    assert (ran.code, ran.err) == (0, "")
    rows = ran.out.splitlines()
    assert rows[0].split() == ["target", "memory", "bandwidth", "int8", "LLM", "CNN", "what", "it", "is"]
    assert rows[1].startswith("host ")
    assert rows[2].split()[:9] == ["apple-m1", "17.2", "GB", "68.25", "GB/s", "11", "Top/s", "mlx", "coreml"]
    assert re.fullmatch("edge-tpu .* –  +tflite  +Google Coral Dev Board .*", next(row for row in rows if row.startswith("edge-tpu")))
    assert qhub("targets", "list").out == ran.out


def test_targets_show_gives_every_fact_with_its_source(qhub):
    ran = qhub("targets", "show", "raspberry-pi-5")
    assert (ran.code, ran.err) == (0, "")
    (row,) = [line for line in ran.out.splitlines() if line.startswith("bandwidth")]
    assert "17.1 GB/s" in row
    assert "derived: 32-bit LPDDR4X-4267" in row
    assert [line for line in ran.out.splitlines() if line.startswith("llm by")] == ["llm by         gguf, native, onnxruntime"]
    document = json.loads(qhub("targets", "show", "raspberry-pi-5", "--json").out)
    assert document["bandwidth_bytes_per_s"]["value"] == 17.1e9
    assert qhub("targets", "show", "zx81") == (2, "", "error: unknown target `zx81`\n\nhint: `qhub targets` lists the known ones\n")


def test_targets_detect_measures_and_the_others_use_what_it_measured(qhub, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert json.loads(qhub("targets", "--json", env=env).out)["targets"][0]["bandwidth_bytes_per_s"] is None
    ran = qhub("targets", "detect", "--json", env=env)
    assert (ran.code, ran.err) == (0, f"kept in {tmp_path}/cache/qhub/host.json\n")
    measured = json.loads(ran.out)["bandwidth_bytes_per_s"]
    assert json.loads(qhub("targets", "list", "--json", env=env).out)["targets"][0]["bandwidth_bytes_per_s"] == measured


def test_a_target_of_a_plugin_is_listed(qhub, toy_plugin):
    env = toy_plugin("board", BOARD)
    assert "toy" in qhub("targets", env=env).out
    assert json.loads(qhub("targets", "show", "toy", "--json", env=env).out)["arch"] == "riscv64"


def test_every_alias_is_listed_after_the_devices(qhub):
    rows = qhub("targets").out.splitlines()
    assert "nvidia  another word for nvidia-ampere" in [re.sub(" +", "  ", row, count=1) for row in rows[-len(REGISTRY.aliases) :]]
    assert len(rows) == 2 + len(REGISTRY.targets) + len(REGISTRY.aliases)


def test_an_alias_shows_the_device_that_is_meant(qhub):
    ran = qhub("targets", "show", "cortex-m")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == qhub("targets", "show", "cortex-m7").out
    said = {line[:15].strip(): line[15:].split("  ")[0].strip() for line in ran.out.splitlines()}
    assert (said["fact"], said["also called"], said["flash"], said["fp16"], said["llm by"]) == ("cortex-m7", "cortex-m", "2.1 MB", "–", "–")
    assert "note: fp16_flops_per_s: no fp16 arithmetic (FPv5 computes in fp32 and fp64)" in ran.out.splitlines()


@pytest.mark.parametrize("name", ["host", "apple-m4", "hexagon", "cortex-m4"])
def test_json_has_every_number_with_its_source_and_what_finishes_a_model(qhub, name):
    (listed,) = [found for found in json.loads(qhub("targets", "list", "--json").out)["targets"] if found["name"] == name]
    shown = json.loads(qhub("targets", "show", name, "--json").out)
    assert shown == listed
    facts = REGISTRY.facts.get(name, {})
    assert {key: fact["value"] for key, fact in shown["facts"].items() if key in facts} == {key: fact.value for key, fact in facts.items()}
    assert all(fact["source"] for fact in shown["facts"].values())
    assert set(shown["finishers"]) == {"llm", "vision", "detection", "nlp", "embedding", "speech", "generative", "unknown"}
    assert shown["aliases"] == list(REGISTRY.aliases_of(name))


def test_the_list_starts_fast(qhub):
    qhub("targets")
    before = os.times()
    for _ in range(5):
        assert qhub("targets").code == 0
    after = os.times()
    # processor time, since other work on the machine must not fail a test; 0.13 s each where this was written
    assert (after.children_user + after.children_system - before.children_user - before.children_system) / 5 < 0.4


def table():
    """The registry as the table of docs/targets.md."""
    lines = ["| target | memory | bandwidth | int8 | language model | image model | what it is |", "|---|---|---|---|---|---|---|"]
    for name, target in REGISTRY.targets.items():
        finishers = [", ".join(entry.name for entry in REGISTRY.finishers(target, task)) or "–" for task in ("llm", "vision")]
        rates = (f"{target.bandwidth_bytes_per_s.value / 1e9:.4g} GB/s", f"{target.int8_ops_per_s.value / 1e12:.4g} Top/s")
        lines.append("| " + " | ".join((f"`{name}`", human_bytes(target.memory_bytes), *rates, *finishers, target.summary)) + " |")
    lines += ["", "| another word | device |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{alias}` | `{name}` |" for alias, name in REGISTRY.aliases.items())])


def test_the_table_in_the_documentation_is_the_registry():
    assert table() in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8"), f"put this into docs/targets.md:\n{table()}"
