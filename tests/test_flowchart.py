"""The chart: every edge leads somewhere, every family has a leaf, and known cases end where an expert expects."""

from __future__ import annotations

from typing import get_args

import pytest

from qhub.route import flowchart
from qhub.route.registry import load_registry
from qhub.types import Family, Goals, ModelProfile, Step, Target, Task

TARGETS = load_registry().targets
M4 = Target(name="cortex-m4", summary="a microcontroller", os="none", arch="armv7m", usable_memory_bytes=256 << 10)
PI4 = Target(name="pi4", summary="Raspberry Pi 4", os="linux", arch="aarch64", isa=("neon",), usable_memory_bytes=4 << 30)
PASCAL = Target(name="gtx1080", summary="a GPU of 2016", os="linux", arch="x86_64", accelerators=("cuda-6.1",))


def model(task, parameters=10**9):
    return ModelProfile("m", "m", task, f"{task}-net", parameters, "fp32", 4 * parameters)


def test_every_edge_leads_to_a_node_and_every_node_is_reached():
    nodes = {*flowchart.QUESTIONS, *flowchart.LEAVES}
    reached = {flowchart.START} | {node for question in flowchart.QUESTIONS.values() for node in question.edges.values()}
    assert reached == nodes


def test_the_model_types_are_the_tasks_and_every_family_has_a_leaf():
    assert set(flowchart.QUESTIONS["D1"].edges) == set(get_args(Task))
    assert {leaf.family for leaf in flowchart.LEAVES.values()} == {*get_args(Family), None}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("task", get_args(Task))
@pytest.mark.parametrize("retrain", [False, True])
def test_every_walk_ends_at_a_leaf_with_its_reasons(task, target, retrain):
    family, path, reasons = flowchart.walk(model(task), Goals(retrain=retrain), target)
    assert path[0].node == flowchart.START
    assert path[-1].node in flowchart.LEAVES
    assert path[-1].answer == (family or "none")
    assert len(reasons) >= len(path) - 1
    assert (family == "qat") == retrain


# The chart of the seeds: model type → family; retraining possible → QAT whatever the model.
@pytest.mark.parametrize(
    ("task", "target", "family"),
    [
        ("llm", "apple-m1", "weight-only"),
        ("llm", "intel-cpu-avx2", "weight-only"),
        ("llm", "nvidia-hopper", "weight-only"),
        ("vision", "apple-m1", "static"),
        ("vision", "intel-cpu-avx2", "static"),
        ("detection", "jetson-orin-nano", "static"),
        ("nlp", "intel-cpu-avx512-vnni", "dynamic"),
        ("speech", "raspberry-pi-5", "dynamic"),
        ("embedding", "nvidia-ada", "float16"),
        ("generative", "nvidia-ada", "float16"),
        ("unknown", "apple-m1", "float16"),
    ],
)
def test_the_model_type_decides_the_family(task, target, family):
    assert flowchart.walk(model(task), Goals(), TARGETS[target])[0] == family


# Hardware: what a device can do changes the answer, and the reason says it.
@pytest.mark.parametrize(
    ("task", "target", "family", "reason"),
    [
        ("llm", TARGETS["apple-m1"], "weight-only", "older charts say no 4-bit on Apple silicon"),
        ("llm", TARGETS["intel-cpu-avx2"], "weight-only", "older charts say no 4-bit on CPUs"),
        ("llm", TARGETS["nvidia-ampere"], "weight-only", "need compute capability 7.5; `nvidia-ampere` has `8.6`"),
        ("llm", PASCAL, None, "4-bit GPU kernels need compute capability 7.5; `gtx1080` has `6.1`"),
        ("llm", M4, None, "`cortex-m4` has no operating system"),
        ("vision", TARGETS["intel-cpu-avx-vnni"], "static", "`avx_vnni` multiplies int8 fast"),
        ("vision", TARGETS["intel-cpu-avx2"], "static", "has no int8 dot product"),
        ("vision", PI4, "static", "has no int8 dot product"),
        ("vision", M4, "static", "microcontrollers run full int8 only"),
        ("nlp", TARGETS["raspberry-pi-5"], "dynamic", "`dotprod` multiplies int8 fast"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_facts_of_the_device_are_the_reason(task, target, family, reason):
    found, _, reasons = flowchart.walk(model(task), Goals(), target)
    assert found == family
    assert any(reason in text for text in reasons), reasons


@pytest.mark.parametrize(
    ("goals", "family"),
    [(Goals(), "float16"), (Goals(max_size_bytes=10**9), "dynamic"), (Goals(max_memory_bytes=10**9), "dynamic")],
    ids=["no limit", "--max-size", "--max-memory"],
)
def test_a_sensitive_model_is_made_smaller_only_if_it_must_be(goals, family):
    assert flowchart.walk(model("embedding"), goals, TARGETS["nvidia-ada"])[0] == family


def test_the_path_is_what_was_asked_and_answered():
    _, path, _ = flowchart.walk(model("llm"), Goals(), TARGETS["apple-m1"])
    assert path == (
        Step("B", "Retraining possible?", "no"),
        Step("D1", "Model type?", "llm"),
        Step("D2", "Does the device run 4-bit weights?", "yes"),
        Step("LW", "Method family", "weight-only"),
    )


def test_mermaid_marks_the_path():
    _, path, _ = flowchart.walk(model("llm"), Goals(), TARGETS["apple-m1"])
    lines = [line.strip() for line in flowchart.mermaid(path).splitlines()]
    assert lines[0] == "graph TD"
    assert "class B,D1,D2,LW walked" in lines
    edges = [line for line in lines if "-->" in line]
    (marked,) = [line for line in lines if line.startswith("linkStyle")]
    numbers = [int(number) for number in marked.split()[1].split(",")]
    assert [edges[number] for number in numbers] == ["B -->|no| D1", "D1 -->|llm| D2", "D2 -->|yes| LW"]


def test_mermaid_without_a_path_marks_nothing():
    text = flowchart.mermaid()
    assert "walked" not in text
    assert "linkStyle" not in text
    assert 'H["Debug pipeline"]' in text
