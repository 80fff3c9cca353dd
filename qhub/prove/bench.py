"""How fast an engine runs a language model: loading, prompts, generation, memory, energy; in a process of its own.

`python -m qhub.prove.bench JOB` measures one `Job` (JSON) and prints events as JSON lines, the last of them the figures. The
process is fresh because its memory and its loading would otherwise be those of whatever ran before.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from qhub import errors
from qhub.errors import PluginError, QhubError, failure_of
from qhub.events import Events
from qhub.plugins import Plugins
from qhub.prove.bench_network import NetworkJob, measure_network
from qhub.prove.energy import counters, joules
from qhub.prove.memory import program_peak_bytes
from qhub.types import OpenOptions, as_json

if TYPE_CHECKING:
    from qhub.interfaces import Runtime, Session

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Job:
    """What to measure: prompts of these numbers of tokens, and the generation of so many; all random, below `vocabulary`."""

    path: str
    runtime: str
    options: OpenOptions
    prompts: tuple[int, ...]
    generate: int
    rounds: int
    vocabulary: int
    seed: int = 0

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `json.dumps(as_json(job))` wrote."""
        values = json.loads(text)
        return cls(**{**values, "options": OpenOptions(**values["options"]), "prompts": tuple(values["prompts"])})


def measure(runtime: Runtime, job: Job, events: Events) -> dict[str, Any]:
    """Open the artifact and measure it. The fields are those of docs/cli.md; null is what was not measured."""
    with events.stage("open"):
        started = time.perf_counter()
        session = runtime.open(Path(job.path), job.options)
        load_s = time.perf_counter() - started
    try:
        prompts = [_prompt(session, count, job, events) for count in job.prompts]
        generated = _generate(session, job, events)
        peak_bytes = program_peak_bytes()  # before the bandwidth is measured: that takes memory of its own
        share = _bandwidth_share(session, job.options.threads or 1, generated["generate_tokens_per_s"])
        compute = _compute_share(session, job.options.threads or 1, prompts)
        how = getattr(session, "how_loaded", None)
    finally:
        session.close()
    return {
        "runtime": job.runtime,
        **dataclasses.asdict(job.options),
        "batch": 1,
        "load_s": load_s,
        "how_loaded": how,
        "prompt": prompts,
        "prompt_tokens_per_s": prompts[-1]["tokens_per_s"] if prompts else None,
        **generated,
        "items_per_s": None,
        "bandwidth_share": share,
        "compute_share": compute,
        "peak_rss_bytes": peak_bytes,
        "float": None,
    }


def _prompt(session: Session, count: int, job: Job, events: Events) -> dict[str, Any]:
    """Tokens per second from a prompt of `count` tokens to the first new one."""
    ids = _random_ids(job, count)
    with events.stage(f"prompt of {count}"):
        seconds = [_first_token_s(session, ids) for _ in range(job.rounds + 1)][1:]  # the first round chooses and warms
    return {"tokens": count, **_spread([count / taken for taken in seconds])}


def _first_token_s(session: Session, ids: Sequence[int]) -> float:
    started = time.perf_counter()
    if next(iter(session.generate(ids, 1, until_stop=False)), None) is None:
        raise QhubError(f"it gave no token for a prompt of `{len(ids)}`", hint="give shorter ones with `--prompt`")
    return time.perf_counter() - started


def _generate(session: Session, job: Job, events: Events) -> dict[str, Any]:
    """Generation after a prompt of one token: rates of whole rounds, and each token's time over all rounds."""
    start, rates, steps_s = _random_ids(job, 1), [], []
    with events.stage(f"generate {job.generate}"):
        list(session.generate(start, min(_WARM_UP_TOKENS, job.generate), until_stop=False))
        before = counters()
        for _ in range(job.rounds):
            stamps = [time.perf_counter() for _ in session.generate(start, job.generate + 1, until_stop=False)]
            if len(stamps) != job.generate + 1:
                raise QhubError(f"it gave `{len(stamps)}` of {job.generate + 1} tokens", hint="generate fewer: `--generate TOKENS`")
            rates.append(job.generate / (stamps[-1] - stamps[0]))
            steps_s += [later - earlier for earlier, later in itertools.pairwise(stamps)]
        used = joules(before, counters())
    spread = _spread(rates)
    return {
        "generate": {"tokens": job.generate, **spread},
        "generate_tokens_per_s": spread["tokens_per_s"],
        "latency_ms": _percentiles(steps_s),
        "energy_j": None if used is None else used / (job.rounds * job.generate),
    }


def _random_ids(job: Job, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(job.seed).integers(0, job.vocabulary, count)]


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"tokens_per_s": statistics.median(rates), "min": min(rates), "max": max(rates)}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(seconds, share)) * 1e3 for share in (50, 90, 99)}


def _bandwidth_share(session: Session, threads: int, tokens_per_s: float) -> float | None:
    """How much of what memory gives the weights take while generating; None where the session does not tell."""
    read_bytes, bandwidth = getattr(session, "bytes_per_token", None), getattr(session, "bandwidth", None)
    if read_bytes is None or bandwidth is None:
        return None
    return float(read_bytes * tokens_per_s / bandwidth(threads))


def _compute_share(session: Session, threads: int, prompts: Sequence[dict[str, Any]]) -> float | None:
    """How much of the peak of int8 arithmetic the longest prompt reaches; None where the session does not tell."""
    ops, peak_ops = getattr(session, "ops_per_token", None), getattr(session, "peak_ops", None)
    peak = peak_ops(threads) if ops is not None and peak_ops is not None and prompts else None
    return None if peak is None else float(ops * prompts[-1]["tokens_per_s"] / peak)


def measure_apart(job: Job | NetworkJob, events: Events) -> dict[str, Any]:
    """`measure` in a fresh process; its stages are handed on to `events`.

    :raises QhubError: what was raised there. :raises PluginError: when the process died.
    """
    command = [sys.executable, "-m", "qhub.prove.bench", json.dumps(as_json(job))]
    figures: dict[str, Any] | None = None
    failure: QhubError | None = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "figures":
                    figures = event["figures"]
                elif event["event"] == "error":
                    failure = getattr(errors, event["kind"], PluginError)(event["message"], hint=event["hint"])
                else:
                    events.relay(event)
        finally:
            process.kill()
            code = process.wait()
            process.stdout.close()
        if failure is not None:
            raise failure
        if figures is None:
            raise _died(job.runtime, code, log)
    return figures


def _died(runtime: str, code: int, log: IO[str]) -> PluginError:
    log.seek(0)
    said = [line for line in log.read().splitlines() if line.strip()]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code `{code}`"
    hint = "run it again; if nobody killed it, memory may have run out"
    return PluginError(f"`{runtime}` {how} while it was measured" + (f": {said[-1]}" if said else ""), hint=hint)


def main(arguments: Sequence[str]) -> int:
    """Measure the job in the only argument; what libraries print goes to stderr."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=stdout, flush=True)

    job = _job(arguments[0])
    events = Events(listener=tell)
    try:
        runtime = Plugins.load().runtimes[job.runtime]
        figures = measure_network(runtime, job, events) if isinstance(job, NetworkJob) else measure(runtime, job, events)
        tell({"event": "figures", "figures": figures})
    except QhubError as error:
        tell(_as_event(error))
        return int(error.exit_code)
    except Exception as error:
        if os.environ.get("QHUB_TRACEBACK"):
            raise
        tell(_as_event(failure_of(job.runtime, error)))
        return int(errors.ExitCode.PLUGIN_FAILED)
    return 0


def _job(text: str) -> Job | NetworkJob:
    values = json.loads(text)
    return NetworkJob.from_values(values) if "batches" in values else Job.from_json(text)


def _as_event(error: QhubError) -> dict[str, Any]:
    return {"event": "error", "kind": type(error).__name__, "message": error.message, "hint": error.hint}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
