"""How much of each channel's size to move from a tensor into the weights that read it, so that both round well.

For norms this is SmoothQuant (arXiv 2211.10438), for convolutions cross-layer equalisation (arXiv 1906.04721) with the
tensor's measured ranges in place of the first layer's weights, whose outputs have a scale each. The exponent of each chain is
the one of least output error; what is moved is kept only if the whole network gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from qhub import Batch, Graph
from qhub_ptq.calibration import Calibration
from qhub_ptq.chains import Chain, chains, folded, input_sizes, multiplied
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan
from qhub_ptq.weights import real, round_weight

EXPONENTS = (0.25, 0.5, 0.75)
_ITEMS = 8  # of each batch, to try exponents on
_BATCHES = 4
_TINY = 1e-12
_FARTHEST = 7.0  # scales lie between exp(−7) and exp(7)
#: The name of a tensor and its batches → the batches as they are read back.
Rounding = Callable[[str, Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def candidates(graph: Graph, plan: Plan, settings: Settings) -> list[Chain]:
    """The chains that may be scaled: all of whose readers are rounded."""
    found = []
    for chain in chains(graph):
        wanted = settings.smooth is not False if chain.maker.kind == "norm" else settings.equalize
        if wanted and all(reader.layer in plan.layers for reader in chain.readers):
            found.append(chain)
    return found


def scaled(graph: Graph, plan: Plan, data: Calibration, rounding: Rounding) -> Graph | None:
    """The network with the best scale of every chain folded in; None where no chain gains."""
    settings = data.settings
    found = candidates(graph, plan, settings)
    seen = _watched(graph, found, data.batches) if found else {}
    scales: dict[Chain, torch.Tensor] = {}
    for chain in found:
        is_fixed = chain.maker.kind == "norm" and not isinstance(settings.smooth, bool)
        scale = best_scale(_Trial(graph, plan, chain, seen[chain.tensor], rounding), (settings.smooth,) if is_fixed else EXPONENTS)
        if scale is not None:
            scales[chain] = scale
    return folded(graph, scales) if scales else None


def best_scale(trial: _Trial, exponents: Iterable[float]) -> torch.Tensor | None:
    """The scale (C,) of least output error; None where none is better than no scale."""
    best, least = None, trial.error(torch.ones(trial.chain.channels))
    for exponent in exponents:
        scale = trial.scale(exponent)
        error = trial.error(scale)
        if error < least:
            best, least = scale, error
    return best


@dataclass(frozen=True)
class _Trial:
    """What is needed to try scales on one chain; `tensors` are a few items of its tensor, batch by batch."""

    graph: Graph
    plan: Plan
    chain: Chain
    tensors: Sequence[torch.Tensor]
    rounding: Rounding

    @property
    def axis(self) -> int:
        """Which axis of the tensor holds the channels."""
        return 1 if self.chain.readers[0].kind == "conv" else -1

    def scale(self, exponent: float) -> torch.Tensor:
        """The tensor's sizes to the power of `exponent` by the weights' sizes to the rest, (C,), of geometric mean one."""
        weights = [input_sizes(self.graph.weight(op.layer or ""), self.chain.channels) for op in self.chain.readers]
        weight = torch.stack(weights).amax(0)
        tensor = torch.stack([x.movedim(self.axis, 0).flatten(1).abs().amax(1) for x in self.tensors]).amax(0)
        alive = (weight > 0) & (tensor > 0)
        logs = torch.where(alive, exponent * tensor.clamp_min(_TINY).log() - (1 - exponent) * weight.clamp_min(_TINY).log(), 0.0)
        middle = logs[alive].mean() if bool(alive.any()) else torch.zeros(())
        return torch.where(alive, (logs - middle).clamp(-_FARTHEST, _FARTHEST), 0.0).exp()

    def error(self, scale: torch.Tensor) -> float:
        """The summed squared change of what the readers make."""
        divisor = scale.reshape(-1, *(1,) * (self.tensors[0].dim() - 2)) if self.axis == 1 else scale
        rounded = self.rounding(self.chain.tensor, [x / divisor for x in self.tensors])
        total = 0.0
        for op in self.chain.readers:
            weight = self.graph.weight(op.layer or "")
            wide = multiplied(weight, scale)
            narrow = real(wide, round_weight(wide, self.plan.schemes[op.layer or ""].weight_bits))
            for x, other in zip(self.tensors, rounded, strict=True):
                change = self.graph.apply(op, narrow, other) - self.graph.apply(op, weight, x)
                total += float(change.double().square().sum())
        return total


def _watched(graph: Graph, found: Iterable[Chain], data: Sequence[Batch]) -> dict[str, list[torch.Tensor]]:
    """A few items of each chain's tensor, batch by batch."""
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in data[:_BATCHES]:
        few = {name: array[:_ITEMS] for name, array in batch.items()}
        for name, tensor in graph.watch(few, {chain.tensor for chain in found}):
            seen.setdefault(name, []).append(tensor.float())
    return seen
