"""The chart: every edge leads somewhere, every family has a leaf, and known cases end where an expert expects."""

from __future__ import annotations

from typing import get_args

import pytest

from qhub.route import flowchart
from qhub.route.accuracy import TOLERANCE
from qhub.route.registry import load_registry
from qhub.types import Family, Goals, ModelProfile, Step, Target, Task

TARGETS = load_registry().targets
PI4 = TARGETS["raspberry-pi-4"]
PASCAL = Target("gtx1080", "a GPU of 2016", "linux", "x86_64", accelerators=("cuda-6.1",), usable_memory_bytes=8 << 30)
OLD_HEXAGON = Target("qcs6490", "Hexagon v68", "android", "aarch64", accelerators=("hexagon-v68",), usable_memory_bytes=4 << 30)
RISCV = Target("riscv", "a RISC-V board", "linux", "riscv64", usable_memory_bytes=4 << 30)


def model(task, parameters=10**9):
    return ModelProfile("m", "m", task, f"{task}-net", parameters, "fp32", 4 * parameters)


def test_every_edge_leads_to_a_node_and_every_node_is_reached():
    nodes = {*flowchart.QUESTIONS, *flowchart.LEAVES}
    reached = {flowchart.START} | {node for question in flowchart.QUESTIONS.values() for node in question.edges.values()}
    assert reached == nodes


def test_the_chart_has_no_circle():
    def visit(node, above):
        assert node not in above
        for following in set(flowchart.QUESTIONS[node].edges.values()) if node in flowchart.QUESTIONS else ():
            visit(following, {*above, node})

    visit(flowchart.START, set())


def test_the_model_types_are_the_tasks_and_every_family_has_a_leaf():
    assert set(flowchart.QUESTIONS["D1"].edges) == set(get_args(Task))
    assert set(get_args(Task)) == set(TOLERANCE)
    assert {leaf.family for leaf in flowchart.LEAVES.values()} == {*get_args(Family), None}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("task", get_args(Task))
@pytest.mark.parametrize("retrain", [False, True])
def test_every_walk_ends_at_a_leaf_with_its_reasons(task, target, retrain):
    found = flowchart.walk(model(task), Goals(retrain=retrain), target)
    assert found.path[0].node == flowchart.START
    assert found.path[-1].node in flowchart.LEAVES
    assert found.path[-1].answer == (found.family or "none")
    assert found.reasons[-1] == found.leaf.reason
    assert (found.family == "qat") == (retrain and found.family is not None)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("goals", [Goals(max_drop_pct=0.01), Goals(max_drop_pct=20), Goals(max_size_bytes=10), Goals(batch=64)], ids=str)
def test_goals_never_lead_astray(goals, target):
    for task in get_args(Task):
        assert flowchart.walk(model(task), goals, target).path[-1].node in flowchart.LEAVES


# The chart of the seeds: model type → family; retraining possible → QAT whatever the model.
@pytest.mark.parametrize(
    ("task", "target", "family"),
    [
        ("llm", "apple-m1", "weight-only"),
        ("llm", "intel-cpu-avx2", "weight-only"),
        ("llm", "nvidia-hopper", "weight-only"),
        ("vision", "apple-m4", "static"),
        ("vision", "intel-cpu-avx2", "static"),
        ("detection", "jetson-orin-nano", "static"),
        ("nlp", "intel-cpu-avx512-vnni", "dynamic"),
        ("speech", "raspberry-pi-5", "dynamic"),
        ("nlp", "nvidia-ada", "float16"),
        ("embedding", "nvidia-ada", "float16"),
        ("generative", "nvidia-ada", "float16"),
        ("unknown", "apple-m1", "float16"),
    ],
)
def test_the_model_type_decides_the_family(task, target, family):
    assert flowchart.walk(model(task), Goals(), TARGETS[target]).family == family


# Hardware: what a device can do changes the answer, and the reason says it.
@pytest.mark.parametrize(
    ("task", "target", "family", "reason"),
    [
        ("llm", TARGETS["apple-m1"], "weight-only", "older charts say no 4-bit on Apple silicon"),
        ("llm", TARGETS["intel-cpu-avx2"], "weight-only", "older charts say no 4-bit on CPUs"),
        ("llm", TARGETS["nvidia-ampere"], "weight-only", "need compute capability 7.5; `nvidia-ampere` has `8.6`"),
        ("llm", TARGETS["nvidia-turing"], "weight-only", "older charts say Ampere: Marlin kernels run on Turing too"),
        ("llm", PASCAL, "float16", "4-bit GPU kernels need compute capability 7.5; `gtx1080` has `6.1`"),
        ("llm", TARGETS["cortex-m4"], None, "`cortex-m4` has no operating system"),
        ("llm", TARGETS["edge-tpu"], None, "caches some 8 MB: no transformers"),
        ("llm", TARGETS["tpu"], "weight-only", "8-bit weights are what its servers run"),
        ("llm", OLD_HEXAGON, "weight-only", "Hexagon before v69 computes int8 only"),
        ("llm", TARGETS["hexagon"], "weight-only", "`hexagon-v75` runs symmetric 4-bit weights with static shapes"),
        ("llm", TARGETS["arm-cpu"], "weight-only", "int4 kernels run on every 64-bit Arm CPU"),
        ("llm", RISCV, "weight-only", "no tuned kernels are known"),
        ("vision", TARGETS["intel-cpu-avx-vnni"], "static", "`avx_vnni` multiplies int8 fast"),
        ("vision", TARGETS["intel-cpu-avx2"], "static", "has no VNNI: int8 runs on AVX2 too (older charts ask for AVX-512)"),
        ("vision", PI4, "static", "has no int8 dot product"),
        ("vision", TARGETS["cortex-m4"], "static", "its kernels take full int8 only"),
        ("vision", TARGETS["apple-m1"], "float16", "before M4 and A17 Pro widens int8 to float16"),
        ("vision", TARGETS["apple-m4"], "static", "the Neural Engine computes int8 from M4"),
        ("vision", TARGETS["nvidia-ada"], "static", "tensor cores multiply int8 from compute capability 7.5 on"),
        ("vision", PASCAL, "float16", "has no tensor cores for int8: support is limited"),
        ("vision", TARGETS["mobile-gpu"], "float16", "mobile GPUs compute in float16 and widen int8"),
        ("vision", TARGETS["tpu"], "float16", "computes bfloat16 as it is"),
        ("nlp", TARGETS["raspberry-pi-5"], "dynamic", "`dotprod` multiplies int8 fast"),
        ("nlp", TARGETS["nvidia-ada"], "float16", "dynamic INT8 has kernels for CPUs only"),
        ("nlp", TARGETS["ai-pc-npu"], "static", "`npu-intel` wants static shapes and ranges"),
        ("embedding", TARGETS["cortex-m55"], "static", "its kernels take full int8 only"),
        ("embedding", TARGETS["intel-cpu-avx2"], "float16", "widens it to 32 bits to compute: half the size, no more speed"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_facts_of_the_device_are_the_reason(task, target, family, reason):
    found = flowchart.walk(model(task), Goals(), target)
    assert found.family == family
    assert any(reason in text for text in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("goals", "family"),
    [
        (Goals(), "float16"),
        (Goals(max_size_bytes=10**9), "dynamic"),
        (Goals(max_memory_bytes=10**9), "dynamic"),
        (Goals(max_drop_pct=3.0), "dynamic"),
    ],
    ids=["no limit", "--max-size", "--max-memory", "--max-drop 3"],
)
def test_a_sensitive_model_is_made_smaller_only_if_it_must_or_may_be(goals, family):
    assert flowchart.walk(model("embedding"), goals, TARGETS["intel-cpu-amx"]).family == family


@pytest.mark.parametrize(
    ("goals", "node"),
    [
        (Goals(), "LW"),
        (Goals(max_drop_pct=0.5), "LW8"),
        (Goals(max_drop_pct=0.01), "L16"),
        (Goals(max_drop_pct=0.01, max_size_bytes=10**9), "LW"),
        (Goals(batch=16), "LD"),
        (Goals(retrain=True), "C"),
    ],
    ids=["no limit", "tight", "tighter than 8 bits", "neither", "a server", "retraining"],
)
def test_goals_decide_the_precision_of_a_language_model(goals, node):
    assert flowchart.walk(model("llm"), goals, TARGETS["nvidia-ampere"]).path[-1].node == node


def test_many_requests_change_nothing_where_int8_is_slow():
    found = flowchart.walk(model("llm"), Goals(batch=64), TARGETS["intel-cpu-avx2"])
    assert found.path[-1].node == "LW"
    assert any("64 requests at once would want 8-bit arithmetic, but" in reason for reason in found.reasons)


def test_the_path_is_what_was_asked_and_answered():
    assert flowchart.walk(model("llm"), Goals(), TARGETS["apple-m1"]).path == (
        Step("B", "Retraining possible?", "no"),
        Step("D", "Does the device run such a model?", "yes"),
        Step("D1", "Model type?", "llm"),
        Step("D21", "How many requests at once?", "few"),
        Step("D22", "Does the device run 4-bit weights?", "yes"),
        Step("D23", "Is the expected loss allowed?", "at 4 bits"),
        Step("LW", "Method family", "weight-only"),
    )


def test_mermaid_marks_the_path():
    found = flowchart.walk(model("vision"), Goals(), TARGETS["apple-m4"])
    lines = [line.strip() for line in flowchart.mermaid(found.path).splitlines()]
    assert lines[0] == "graph TD"
    assert "class B,D,D1,D3,D31,LS walked" in lines
    edges = [line for line in lines if "-->" in line]
    (marked,) = [line for line in lines if line.startswith("linkStyle")]
    numbers = [int(number) for number in marked.split()[1].split(",")]
    walked = ["B -->|no| D", "D -->|yes| D1", "D1 -->|vision| D3", "D3 -->|yes| D31", "D31 -->|yes| LS"]
    assert [edges[number] for number in numbers] == walked


def test_mermaid_without_a_path_marks_nothing():
    text = flowchart.mermaid()
    assert "walked" not in text
    assert "linkStyle" not in text
    assert 'H["Debug pipeline"]' in text
