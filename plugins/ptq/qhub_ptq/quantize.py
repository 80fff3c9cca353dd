"""From a job to its result: the family of the scheme decides what is done, then what costs too much is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qhub import Graph, GraphJob, GraphResult, QhubError, Quantization
from qhub_ptq.calibration import Calibration
from qhub_ptq.dynamic import read_dynamic, round_dynamic
from qhub_ptq.fallback import within_goal
from qhub_ptq.judge import Judge
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan, plan_of
from qhub_ptq.scaling import Rounding, scaled
from qhub_ptq.static import read_static, round_static

_JUDGED = 4  # batches
_UNCHANGED = 1e-8  # squared relative change of the float outputs that scaling channels may make
_CASTS = {"fp16": "float16", "bf16": "bfloat16"}


def quantize(job: GraphJob, options: Mapping[str, Any]) -> GraphResult:
    """Round the graph of `job`.

    :raises QhubError: when it has no layer to quantize, or its numbers are not finite.
    """
    plan, notes = plan_of(job)
    if not plan.layers:
        raise QhubError("the network has no layer to quantize", hint="`qhub inspect` shows its layers; do overrides leave all of them out?")
    if job.scheme.is_float:
        return GraphResult(job.graph, Quantization(casts={layer: _CASTS[str(scheme)] for layer, scheme in plan.schemes.items()}), notes)
    batches = list(job.calibration())
    if not batches and job.scheme.activation == "static":
        raise QhubError("static rounding needs calibration items, and there are none", hint="give some with `--calib`")
    data = Calibration(batches, Settings.of(options, job.target), Judge.of(job.graph, batches[:_JUDGED]))
    graph, quantization = _rounded(job.graph, plan, data, is_dynamic=job.scheme.activation == "dynamic")
    quantization, kept = within_goal(job, graph, quantization, data)
    casts = {layer: "float16" for layer in kept if layer in plan.layers}
    return GraphResult(graph, replace(quantization, casts=casts), {**notes, **kept})


def _rounded(graph: Graph, plan: Plan, data: Calibration, *, is_dynamic: bool) -> tuple[Graph, Quantization]:
    """The graph, with channels scaled if the rounded network then comes closer to the float one, and how it is rounded."""
    read, round_graph = (read_dynamic, round_dynamic) if is_dynamic else (read_static, round_static)
    plain = (graph, round_graph(graph, plan, data))
    other = _scaled(graph, plan, data, lambda tensor, seen: read(tensor, seen, plan, data.settings))
    if other is None:
        return plain
    return min((plain, (other, round_graph(other, plan, data))), key=lambda one: data.judge.error(one[0].rounded(one[1])))


def _scaled(graph: Graph, plan: Plan, data: Calibration, rounding: Rounding) -> Graph | None:
    other = scaled(graph, plan, data, rounding) if data.batches else None
    return None if other is None or data.judge.error(other) > _UNCHANGED else other
