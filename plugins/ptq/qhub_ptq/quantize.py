"""From a job to its result: the family of the scheme decides what is done, then what costs too much is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from qhub import GraphJob, GraphResult, QhubError, Quantization
from qhub_ptq.dynamic import dynamic
from qhub_ptq.judge import Judge
from qhub_ptq.options import Settings
from qhub_ptq.plan import layers_of, plan_of
from qhub_ptq.static import Calibration, static

_JUDGED = 4  # batches
CASTS = {"fp16": "float16", "bf16": "bfloat16"}


def quantize(job: GraphJob, options: Mapping[str, Any]) -> GraphResult:
    """Round the graph of `job`."""
    settings = Settings.of(options, job.target)
    layers, schemes = layers_of(job)
    if not layers:
        raise QhubError("the network has no layer to quantize", hint="`qhub inspect` shows its layers; overrides may exclude them all")
    if job.scheme.is_float:
        return GraphResult(job.graph, Quantization(casts={layer: CASTS[str(scheme)] for layer, scheme in schemes.items()}))
    batches = list(job.calibration())
    if job.scheme.activation == "dynamic":
        return dynamic(job, settings, batches)
    data = Calibration(batches, settings, Judge.of(job.graph, list(islice(batches, _JUDGED))))
    graph, quantization = static(job.graph, plan_of(job), data)
    return GraphResult(graph, quantization)
