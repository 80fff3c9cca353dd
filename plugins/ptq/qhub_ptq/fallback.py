"""What costs too much stays float: the fewest operations, taken back until the loss is within the goal.

Operations are ranked by how much closer the outputs come when that one alone is float (measured for those that add the most
noise of their own). The smallest number of them that reaches the goal is searched by halving; then each is tried without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qhub import Graph, GraphJob, Op, Quantization
from qhub_ptq.calibration import Calibration
from qhub_ptq.dynamic import round_rows
from qhub_ptq.moments import round_on
from qhub_ptq.weights import real

_MEASURED = 12  # operations whose effect on the outputs is measured
_ITEMS = 16  # of the first batch, for the noise of each operation


def within_goal(job: GraphJob, graph: Graph, quantization: Quantization, data: Calibration) -> tuple[Quantization, dict[str, str]]:
    """The quantization with as few operations in float as the goal takes, and why each of them, by layer (or operation)."""
    if not data.batches:
        return quantization, {}
    trial = _Trial(job, graph, quantization)
    loss = trial.loss(())
    if loss <= job.max_drop_pct:
        return quantization, {}
    job.note(f"{loss:.2f} % lost on the calibration items, {job.max_drop_pct:g} % allowed: looking for what to keep in float")
    ranked = _ranked(trial, data)
    kept = _needed(trial, ranked[: _fewest(trial, ranked)])
    left = trial.loss(kept)
    reason = f"stays float: rounding it is part of {loss:.2f} % loss on the calibration items; {left:.2f} % with it in float"
    return quantization.without(kept), {op.layer or op.name: reason for op in kept}


@dataclass(frozen=True)
class _Trial:
    job: GraphJob
    graph: Graph
    quantization: Quantization

    def loss(self, kept: Sequence[Op]) -> float:
        """What is lost with these operations in float, in percent."""
        return self.job.drop_pct(self.graph.rounded(self.quantization.without(kept)))


def _ranked(trial: _Trial, data: Calibration) -> list[Op]:
    """Every operation that reads rounded numbers, the one first whose rounding harms most."""
    rounded = {name for readers in trial.quantization.readers.values() for name in readers}
    ops = [op for op in trial.graph.ops if op.name in rounded or (op.layer in trial.quantization.weights and op.has_weight)]
    noise = _noise(trial, data)
    ops.sort(key=lambda op: -noise.get(op.name, 0.0))
    errors: dict[str, float] = {}
    for done, op in enumerate(ops[:_MEASURED]):
        trial.job.progress(done, min(_MEASURED, len(ops)), f"effect of {op.layer or op.name}")
        errors[op.name] = data.judge.error(trial.graph.rounded(trial.quantization.without([op])))
    return sorted(ops[:_MEASURED], key=lambda op: errors[op.name]) + ops[_MEASURED:]


def _noise(trial: _Trial, data: Calibration) -> dict[str, float]:
    """The squared change that rounding its weight and its input alone makes of each layer's output, as a share of its square."""
    layers = [op for op in trial.graph.ops if op.has_weight and op.layer in trial.quantization.weights]
    few = {name: array[:_ITEMS] for name, array in data.batches[0].items()}
    seen = dict(trial.graph.watch(few, {op.inputs[0] for op in layers}))
    found = {}
    for op in layers:
        x, weight = seen[op.inputs[0]].float(), trial.graph.weight(op.layer or "")
        exact = trial.graph.apply(op, weight, x)
        made = trial.graph.apply(op, real(weight, trial.quantization.weights[op.layer or ""]), _read(trial.quantization, op, x))
        found[op.name] = float((made - exact).square().sum() / exact.square().sum().clamp_min(1e-12))
    return found


def _read(quantization: Quantization, op: Op, x: torch.Tensor) -> torch.Tensor:
    """x as the operation reads it."""
    if op.layer in quantization.dynamic:
        return round_rows(x)
    tensors: Mapping[str, tuple[str, ...]] = quantization.readers
    is_read = op.name in tensors.get(op.inputs[0], ())
    return round_on(quantization.activations[op.inputs[0]] if is_read else None, x)


def _fewest(trial: _Trial, ranked: Sequence[Op]) -> int:
    """How many of the first operations have to be float, if more of them never lose more."""
    low, high = 0, len(ranked)  # `low` are too few, `high` are enough: with all of them the network is the float one
    while high - low > 1:
        middle = (low + high) // 2
        trial.job.progress(middle, len(ranked), f"loss with {middle} operations in float")
        low, high = (low, middle) if trial.loss(ranked[:middle]) <= trial.job.max_drop_pct else (middle, high)
    return high


def _needed(trial: _Trial, kept: Sequence[Op]) -> list[Op]:
    """Those without which the goal is missed; the least harmful are tried first."""
    needed = list(kept)
    for done, op in enumerate(reversed(kept)):
        trial.job.progress(done, len(kept), f"loss with {op.layer or op.name} rounded after all")
        without = [other for other in needed if other is not op]
        if trial.loss(without) <= trial.job.max_drop_pct:
            needed = without
    return needed
