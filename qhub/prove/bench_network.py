"""How fast an engine runs a network, quantized and float in turn; in a process of its own, as `bench.py` does for language models."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qhub.events import Events
from qhub.graph.values import Batch, GraphInput
from qhub.prove.energy import counters, joules
from qhub.prove.memory import program_peak_bytes
from qhub.types import OpenOptions

if TYPE_CHECKING:
    from qhub.interfaces import GraphSession, Runtime

_LEAST_S, _LEAST_CALLS, _WARM_UP_CALLS = 0.2, 10, 3
_IDS = 100  # ids of random texts where no vocabulary is known


@dataclass(frozen=True)
class NetworkJob:
    """What to measure: batches of these sizes of random inputs, `length` long where texts or sounds are.

    `float_path`, the same network in float in the same format, is measured in turn with `path`.
    """

    path: str
    runtime: str
    options: OpenOptions
    batches: tuple[int, ...]
    length: int
    rounds: int
    vocabulary: int = _IDS
    float_path: str | None = None
    seed: int = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> NetworkJob:
        """Read what `as_json(job)` made."""
        return cls(**{**values, "options": OpenOptions(**values["options"]), "batches": tuple(values["batches"])})


def measure_network(runtime: Runtime, job: NetworkJob, events: Events) -> dict[str, Any]:
    """Open the artifact and measure it, beside the float one if there is one. The fields are those of docs/cli.md."""
    session, load_s = _open(runtime, job.path, job.options, events)
    sessions = {"quantized": session}
    try:
        _call(session, inputs_for(session.inputs, job, job.batches[-1]))
        peak_bytes = program_peak_bytes()
        loads = {"quantized": load_s}
        if job.float_path is not None:
            sessions["float"], loads["float"] = _open(runtime, job.float_path, job.options, events)
        rows = [_batch(sessions, job, size, events) for size in job.batches]
    finally:
        for opened in sessions.values():
            opened.close()
    found = {kind: _figures(job, [row[kind] for row in rows], loads[kind]) for kind in sessions}
    return {**found["quantized"], "peak_rss_bytes": peak_bytes, "float": found.get("float")}


def _open(runtime: Runtime, path: str, options: OpenOptions, events: Events) -> tuple[GraphSession, float]:
    with events.stage("open"):
        started = time.perf_counter()
        return runtime.open_graph(Path(path), options), time.perf_counter() - started


def inputs_for(inputs: Sequence[GraphInput], job: NetworkJob, size: int) -> Batch:
    """Random inputs: numbers of a normal distribution, ids below the vocabulary, masks of ones."""
    random = np.random.default_rng(job.seed)
    batch = {}
    for item in inputs:
        shape = [wide if wide > 0 else size if axis == 0 else job.length for axis, wide in enumerate(item.shape)]
        kind = np.dtype(item.dtype)
        if kind.kind == "f":
            batch[item.name] = random.standard_normal(shape).astype(kind)
        elif "mask" in item.name:
            batch[item.name] = np.ones(shape, kind)
        else:
            batch[item.name] = random.integers(0, 1 if "type" in item.name else job.vocabulary, shape).astype(kind)
    return batch


def _call(session: GraphSession, batch: Batch) -> float:
    started = time.perf_counter()
    session.run(batch)
    return time.perf_counter() - started


def _batch(sessions: Mapping[str, GraphSession], job: NetworkJob, size: int, events: Events) -> dict[str, dict[str, Any]]:
    """Rounds of calls, quantized and float in turn, so that both meet the same machine."""
    batch = inputs_for(next(iter(sessions.values())).inputs, job, size)
    seconds: dict[str, list[float]] = {kind: [] for kind in sessions}
    used: dict[str, list[float]] = {kind: [] for kind in sessions}
    with events.stage(f"batch of {size}"):
        calls = {kind: _calls_for(session, batch) for kind, session in sessions.items()}
        for _ in range(job.rounds):
            for kind, session in sessions.items():
                before = counters()
                seconds[kind] += [_call(session, batch) for _ in range(calls[kind])]
                energy = joules(before, counters())
                used[kind] += [] if energy is None else [energy / (calls[kind] * size)]
    return {kind: _row(size, seconds[kind], used[kind]) for kind in sessions}


def _calls_for(session: GraphSession, batch: Batch) -> int:
    """How many calls fill a round, after some that only warm up."""
    once = min(_call(session, batch) for _ in range(_WARM_UP_CALLS))
    return max(_LEAST_CALLS, min(int(_LEAST_S / max(once, 1e-6)), 1000))


def _row(size: int, seconds: Sequence[float], used: Sequence[float]) -> dict[str, Any]:
    latency = {f"p{share}": float(np.percentile(seconds, share)) * 1e3 for share in (50, 90, 99)}
    return {
        "batch": size,
        "latency_ms": latency,
        "items_per_s": size / statistics.median(seconds),
        "energy_j": statistics.median(used) if used else None,
    }


def _figures(job: NetworkJob, rows: list[dict[str, Any]], load_s: float) -> dict[str, Any]:
    """One artifact: its first batch as the headline, all of them as `batches`."""
    return {
        "runtime": job.runtime,
        **dataclasses.asdict(job.options),
        **rows[0],
        "prompt_tokens_per_s": None,
        "generate_tokens_per_s": None,
        "bandwidth_share": None,
        "load_s": load_s,
        "batches": rows,
    }
