"""Static rounding: weights and tensors on grids that calibration fixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qhub import ActivationGrid, Batch, Graph, QhubError, QTensor, Quantization
from qhub_ptq.histogram import Histogram, histograms
from qhub_ptq.judge import Judge
from qhub_ptq.moments import Moments, round_on, taps_of
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan
from qhub_ptq.ranges import RANGES, grid_of
from qhub_ptq.scaling import scaled
from qhub_ptq.weights import real, round_for_inputs, round_weight

UNCHANGED = 1e-8  # squared relative change of the float outputs that scaling channels may make
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


def static(graph: Graph, plan: Plan, data: Calibration) -> tuple[Graph, Quantization]:
    """The graph, perhaps with channels scaled, and how it is rounded."""
    settings = data.settings

    def rounding(tensor: str, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = Histogram()
        for x in batches:
            found.add(x)
        grid = grid_for(found, plan.bits[plan.root[tensor]], settings)
        return [round_on(grid, x) for x in batches]

    plain = (graph, round_graph(graph, plan, data))
    other = scaled(graph, plan, data.batches, settings, rounding)
    if other is None or data.judge.error(other) > UNCHANGED:
        return plain
    return min((plain, (other, round_graph(other, plan, data))), key=lambda one: data.judge.error(one[0].rounded(one[1])))


def round_graph(graph: Graph, plan: Plan, data: Calibration) -> Quantization:
    """How `graph` is rounded as it is."""
    activations = grids(watched(graph, plan, data), plan, data.settings)
    moments = moments_of(graph, plan, activations, data)
    weights = round_weights(graph, plan, moments, data.settings)
    plain = Quantization(weights, activations, {point.tensor: point.readers for point in plan.points})
    if not data.settings.correct_bias:
        return plain
    corrected = replace(plain, biases=corrected_biases(graph, plan, weights, moments))
    return min((corrected, plain), key=lambda one: data.judge.error(graph.rounded(one)))


def watched(graph: Graph, plan: Plan, data: Calibration) -> dict[str, Histogram]:
    """What the tensors hold.

    :raises QhubError: naming the first tensor with a number that is not finite, and who reads it.
    """
    try:
        return histograms(data.watch(graph, plan.own))
    except ValueError as error:
        readers = next((point.readers for point in plan.points if point.tensor == str(error)), ())
        layers = {op.name: op.layer or op.name for op in graph.ops}
        who = ", ".join(f"`{layers[name]}`" for name in readers)
        message = f"tensor `{error}`, which {who} reads, holds numbers that are not finite on the calibration data"
        raise QhubError(message, hint="check how the calibration items are normalised, or keep the layers before it in float") from None


def grids(found: Mapping[str, Histogram], plan: Plan, settings: Settings) -> dict[str, ActivationGrid]:
    """The grid of every rounded tensor."""
    own = {tensor: grid_for(found[tensor], plan.bits[tensor], settings) for tensor in plan.own}
    return {point.tensor: own[plan.root[point.tensor]] for point in plan.points}


def grid_for(found: Histogram, bits: int, settings: Settings) -> ActivationGrid:
    """The grid for numbers that lie so."""
    return grid_of(RANGES[settings.range](found, bits, symmetric=settings.symmetric), bits, symmetric=settings.symmetric)


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
