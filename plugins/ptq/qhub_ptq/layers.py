"""The weights and biases of a graph's layers: codes, and the mean error that they leave taken off the bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from qhub import Graph, Op, QTensor, Quantization
from qhub_ptq.calibration import Calibration, not_finite
from qhub_ptq.moments import Moments, taps_of
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan
from qhub_ptq.weights import real, round_for_inputs, round_weight

_PRODUCTS_FROM = 16  # batches at most whose second moments are taken
#: What a layer reads → what it reads of it when rounded.
Reading = Callable[[Op, torch.Tensor], torch.Tensor]


def round_layers(graph: Graph, plan: Plan, data: Calibration, reading: Reading, start: Quantization) -> Quantization:
    """`start` with the weights of the plan's layers, and with biases corrected if that brings the outputs closer."""
    moments = moments_of(graph, plan, data, reading)
    weights = round_weights(graph, plan, moments, data.settings)
    plain = replace(start, weights=weights)
    if not data.settings.correct_bias or not data.batches:
        return plain
    corrected = replace(plain, biases=corrected_biases(graph, plan, weights, moments))
    return min((corrected, plain), key=lambda one: data.judge.error(graph.rounded(one)))


def moments_of(graph: Graph, plan: Plan, data: Calibration, reading: Reading) -> dict[str, Moments]:
    """What is needed of every layer's input, from one pass.

    :raises QhubError: when a layer reads a number that is not finite.
    """
    found = {layer: Moments() for layer in plan.layers}
    compensated = {layer for layer, scheme in plan.schemes.items() if scheme.weight_bits < 8 and data.settings.compensate}
    if not compensated and not data.settings.correct_bias:
        return found
    tensors = {op.inputs[0] for op in plan.layers.values()}
    for index, watched in enumerate(data.watch(graph, tensors)):
        seen = dict(watched)
        for layer, op in plan.layers.items():
            x = seen[op.inputs[0]].float()
            rounded = reading(op, x)
            if not found[layer].add(op, x, rounded):
                raise not_finite(graph, op.inputs[0])
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
