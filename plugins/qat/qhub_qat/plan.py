"""What is rounded: the layers with their schemes, the tensors with their bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qhub import Graph, Op, Point, Scheme, place

EDGE_BITS = 8


@dataclass(frozen=True)
class Plan:
    """`scheme` of the whole; `layers`: layer → its operations; `schemes`: layer → scheme; `points`: the rounded tensors.

    `bits`: of each tensor that has its own grid; `notes`: what to say of which layer.
    """

    scheme: Scheme
    layers: Mapping[str, tuple[Op, ...]]
    schemes: Mapping[str, Scheme]
    points: tuple[Point, ...]
    bits: Mapping[str, int]
    notes: Mapping[str, str]

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Tensor → the operations that read it rounded."""
        return {point.tensor: point.readers for point in self.points}


def plan_of(graph: Graph, scheme: Scheme, scheme_of: Callable[[str], Scheme | None], *, edges: bool) -> Plan:
    """The plan of a graph; with `edges` the first and the last layer have 8 bits, unless they have a scheme of their own."""
    layers: dict[str, tuple[Op, ...]] = {}
    for op in graph.ops:
        if op.has_weight and op.layer is not None:
            layers[op.layer] = (*layers.get(op.layer, ()), op)
    chosen = {layer: scheme_of(layer) for layer in layers}
    ends = {name for name in (*list(layers)[:1], *list(layers)[-1:]) if edges}
    wide = replace(scheme, weight_bits=EDGE_BITS, activation_bits=EDGE_BITS)
    raised = [layer for layer in layers if layer in ends and chosen[layer] == scheme != wide]
    schemes = {layer: wide if layer in raised else one for layer, one in chosen.items() if one is not None}
    quantized = {layer: ops for layer, ops in layers.items() if layer in schemes}
    points = _points(graph, {op.name for layer, ops in layers.items() if layer not in schemes for op in ops})
    bits = _bits(points, {op.name: schemes[layer].activation_bits for layer, ops in quantized.items() for op in ops}, scheme)
    notes = {layer: "8 bits: the first and the last layer are not rounded further (option `edges`)" for layer in raised}
    return Plan(scheme, quantized, schemes, points, bits, notes)


def _points(graph: Graph, kept_float: set[str]) -> tuple[Point, ...]:
    """The tensors that somebody reads rounded, when the operations in `kept_float` read floats."""
    points = [replace(point, readers=tuple(name for name in point.readers if name not in kept_float)) for point in place(graph.ops)]
    points = [point for point in points if point.readers]
    there = {point.tensor for point in points}
    return tuple(point if point.like in there else replace(point, like=None) for point in points)


def _bits(points: tuple[Point, ...], asked: Mapping[str, int], scheme: Scheme) -> dict[str, int]:
    """The bits of each grid: the most that a layer among its readers asks for."""
    found: dict[str, int] = {}
    for point in points:
        root = point.like or point.tensor
        found[root] = max([found.get(root, 0), *(asked[name] for name in point.readers if name in asked)])
    return {root: bits or scheme.activation_bits for root, bits in found.items()}
