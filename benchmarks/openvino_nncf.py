"""Networks quantized here against NNCF's quantization of the same float network, both in OpenVINO, in turn in one process.

    python benchmarks/openvino_nncf.py RUN … [--rounds 7]

RUN is a run of `qhub run … --plugin openvino` on a network; its calibration items are given to NNCF too. Needs nncf.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qhub_openvino.devices import settings
from qhub_openvino.network_session import NetworkSession
from qhub_openvino.plugin import OpenVinoExporter
from qhub_openvino.vendor import ov

from qhub import Batch, OpenOptions
from qhub.feeding import feed
from qhub.networks import export_float, float_graph
from qhub.route.recipe import from_yaml
from qhub.rundir import RunDir

MODEL = "openvino_model.xml"
CALLS = 20


class Compiled:
    """A model of NNCF's, opened as our sessions open one."""

    def __init__(self, model: ov.Model, threads: int) -> None:
        compiled = ov.Core().compile_model(model, "CPU", settings("CPU", OpenOptions(threads=threads)))
        self._request, self.names = compiled.create_infer_request(), [item.any_name for item in model.inputs]

    def run(self, batch: Batch) -> tuple[Any, ...]:
        """The outputs for one batch."""
        found = self._request.infer({name: batch[name] for name in self.names}, share_inputs=True)
        return tuple(found.values())


def theirs(source: Path, items: list[Batch], *, transformer: bool) -> dict[str, ov.Model]:
    """NNCF's models of the float one, by preset."""
    import nncf

    kind = nncf.ModelType.TRANSFORMER if transformer else None
    found = {}
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        model = ov.Core().read_model(source / MODEL)
        found[f"nncf {preset.name.lower()}"] = nncf.quantize(
            model, nncf.Dataset([dict(item) for item in items]), preset=preset, model_type=kind, subset_size=len(items)
        )
    return found


def repeated(batch: Batch, count: int) -> Batch:
    """The first item so many times."""
    return {name: np.repeat(values[:1], count, axis=0) for name, values in batch.items()}


def timed(sessions: dict[str, Any], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call: the median of each round, one round of every session in turn."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(batch)
    for _ in range(rounds):
        for name, session in sessions.items():
            times = []
            for _ in range(max(3, CALLS // len(next(iter(batch.values()))))):
                start = time.perf_counter()
                session.run(batch)
                times.append(1e3 * (time.perf_counter() - start))
            found[name].append(statistics.median(times))
    return found


def right(session: Any, items: Iterator[Batch], labels: list[int]) -> float:  # noqa: ANN401 - a session of either kind
    """The share of items whose first answer is the label, in percent."""
    answers = np.concatenate([np.asarray(session.run(batch)[0]).argmax(-1).reshape(-1) for batch in items])
    return 100 * float((answers == np.array(labels[: len(answers)])).mean())


def measure(run: Path, rounds: int) -> dict[str, Any]:
    """One run's figures."""
    recipe = from_yaml((run / "recipe.yaml").read_text(encoding="utf-8"))
    calibration, evaluation = feed(recipe, recipe.calibration, seed=recipe.seed or None), feed(recipe, recipe.evaluation)
    items = [
        {name: values[index : index + 1] for name, values in batch.items()}
        for batch in calibration.batches()
        for index in range(len(next(iter(batch.values()))))
    ][:300]
    with tempfile.TemporaryDirectory() as work:
        floating = export_float(float_graph(RunDir(run), recipe, calibration), recipe, OpenVinoExporter(), Path(work) / "float")
        return compared(run, floating, (recipe.scheme, items, evaluation), rounds)


def compared(run: Path, floating: Path, data: tuple[str, list[Batch], Any], rounds: int) -> dict[str, Any]:
    """The figures of a run whose float network lies in `floating`; `data` are the scheme, calibration items, and the evaluation's."""
    scheme, items, evaluation = data
    models = theirs(floating, items, transformer="input_ids" in items[0])
    result: dict[str, Any] = {"run": run.name, "scheme": scheme, "latency_ms": {}, "accuracy_pct": {}}
    longest = max(items, key=lambda item: max(values.size for values in item.values()))
    for threads in (1, 2):
        options = OpenOptions(threads=threads)
        sessions: dict[str, Any] = {
            "float": NetworkSession(floating, options),
            "qhub": NetworkSession(run / "artifact" / "openvino", options),
        }
        sessions |= {name: Compiled(model, threads) for name, model in models.items()}
        if threads == 1 and evaluation.has_labels:
            labels = [int(one) for part in evaluation.labels() for one in np.asarray(part).reshape(-1)]
            result["accuracy_pct"] = {name: right(session, evaluation.batches(), labels) for name, session in sessions.items()}
        for batch in (1, 32):
            found = timed(sessions, repeated(longest, batch), rounds)
            result["latency_ms"][f"{threads} threads, batch {batch}"] = {
                name: [round(statistics.median(times), 3), round(min(times), 3)] for name, times in found.items()
            }
    return result


def main() -> None:
    """Measure the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    for run in given.runs:
        print(json.dumps(measure(run, given.rounds), indent=1))


if __name__ == "__main__":
    main()
