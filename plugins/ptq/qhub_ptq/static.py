"""Static rounding: weights and tensors on grids that calibration fixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qhub import ActivationGrid, Batch, Graph, QTensor, Quantization
from qhub_ptq.histogram import Histogram, histograms
from qhub_ptq.judge import Judge
from qhub_ptq.moments import Moments, round_on, taps_of
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan
from qhub_ptq.ranges import RANGES, grid_of
from qhub_ptq.weights import real, round_for_inputs, round_weight

_PRODUCTS_FROM = 16  # batches at most whose second moments are taken


@dataclass(frozen=True)
class Calibration:
    """The batches, how to round, and whom to ask whether it helped."""

    batches: Sequence[Batch]
    settings: Settings
    judge: Judge

    def watch(self, graph: Graph, tensors: Sequence[str]) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """The tensors of each batch."""
        return (graph.watch(batch, tensors) for batch in self.batches)


def static(graph: Graph, plan: Plan, data: Calibration) -> Quantization:
    """How `graph` is rounded."""
    found = histograms(lambda: data.watch(graph, plan.own))
    activations = grids(found, plan, data.settings)
    moments = moments_of(graph, plan, activations, data)
    weights = round_weights(graph, plan, moments, data.settings)
    plain = Quantization(weights, activations, {point.tensor: point.readers for point in plan.points})
    if not data.settings.correct_bias:
        return plain
    corrected = replace(plain, biases=corrected_biases(graph, plan, weights, moments))
    return min((corrected, plain), key=lambda one: data.judge.error(graph.rounded(one)))


def grids(found: Mapping[str, Histogram], plan: Plan, settings: Settings) -> dict[str, ActivationGrid]:
    """The grid of every rounded tensor."""
    own = {}
    for tensor in plan.own:
        ends = RANGES[settings.range](found[tensor], plan.bits[tensor], symmetric=settings.symmetric)
        own[tensor] = grid_of(ends, plan.bits[tensor], symmetric=settings.symmetric)
    return {point.tensor: own[point.like or point.tensor] for point in plan.points}


def moments_of(graph: Graph, plan: Plan, activations: Mapping[str, ActivationGrid], data: Calibration) -> dict[str, Moments]:
    """What is needed of every layer's input, from one pass."""
    found = {layer: Moments() for layer in plan.layers}
    compensated = {layer for layer, scheme in plan.schemes.items() if scheme.weight_bits < 8 and data.settings.compensate}
    if not compensated and not data.settings.correct_bias:
        return found
    tensors = sorted({op.inputs[0] for op in plan.layers.values()})
    for index, watched in enumerate(data.watch(graph, tensors)):
        seen = dict(watched)
        for layer, op in plan.layers.items():
            x = seen[op.inputs[0]].float()
            rounded = round_on(activations.get(plan.input_of.get(op.name, "")), x)
            found[layer].add(op, x, rounded)
            if layer in compensated and index < _PRODUCTS_FROM:
                found[layer].add_products(taps_of(graph, op, x), taps_of(graph, op, rounded))
    return found


def round_weights(graph: Graph, plan: Plan, moments: Mapping[str, Moments], settings: Settings) -> dict[str, QTensor]:
    """The codes of every layer."""
    found = {}
    for layer, scheme in plan.schemes.items():
        weight = graph.weight(layer)
        if moments[layer].gram is not None:
            found[layer] = round_for_inputs(weight, scheme.weight_bits, moments[layer])
        else:
            found[layer] = round_weight(weight, scheme.weight_bits, reduce_range=settings.reduce_range)
    return found


def corrected_biases(graph: Graph, plan: Plan, weights: Mapping[str, QTensor], moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """Biases less the mean by which rounding moves each layer's outputs (arXiv 1906.04721, measured instead of assumed)."""
    found = {}
    for layer, op in plan.layers.items():
        weight, bias, seen = graph.weight(layer), graph.bias(layer), moments[layer]
        moved = seen.rounded.output(graph, op, real(weight, weights[layer])) - seen.exact.output(graph, op, weight)
        found[layer] = (torch.zeros(len(weight)) if bias is None else bias) - moved
    return found
