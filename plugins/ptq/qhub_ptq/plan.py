"""What is to be rounded in a graph: its layers with their schemes, its tensors with their bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qhub import Graph, GraphJob, Op, Point, Scheme, place


@dataclass(frozen=True)
class Plan:
    """`layers`: the operation of each layer to round; `schemes` of the same; `points`: the tensors, each with its `bits`."""

    layers: Mapping[str, Op]
    schemes: Mapping[str, Scheme]
    points: tuple[Point, ...]
    bits: Mapping[str, int]

    @cached_property
    def input_of(self) -> Mapping[str, str]:
        """Operation → the tensor that it reads rounded, for operations that read one tensor."""
        return {reader: point.tensor for point in self.points for reader in point.readers}

    @cached_property
    def root(self) -> Mapping[str, str]:
        """Tensor → the tensor whose grid it has."""
        return {point.tensor: point.like or point.tensor for point in self.points}

    @property
    def own(self) -> tuple[str, ...]:
        """The tensors that have a grid of their own."""
        return tuple(point.tensor for point in self.points if point.like is None)


def plan_of(job: GraphJob) -> tuple[Plan, dict[str, str]]:
    """What `job` asks for, and which layers stay float though a scheme was given for them, with the reason."""
    asked, schemes = _asked(job)
    layers = {name: op for name, op in asked.items() if job.scheme.activation != "dynamic" or op.kind == "linear"}
    left = {name: "stays float: dynamic rounding is for linear layers" for name in asked if name not in layers}
    schemes = {name: schemes[name] for name in layers}
    points = _points(job.graph, layers) if job.scheme.activation == "static" else ()
    return Plan(layers, schemes, points, _bits(job, points, {op.name: schemes[name] for name, op in layers.items()})), left


def _asked(job: GraphJob) -> tuple[dict[str, Op], dict[str, Scheme]]:
    """The layers that have a scheme: name → the first operation that has it, and the scheme."""
    layers: dict[str, Op] = {}
    schemes: dict[str, Scheme] = {}
    for op in job.graph.ops:
        scheme = job.scheme_of(op.layer) if op.has_weight and op.layer else None
        if scheme is not None and op.layer is not None and op.layer not in layers:
            layers[op.layer], schemes[op.layer] = op, scheme
    return layers, schemes


def _points(graph: Graph, layers: Collection[str]) -> tuple[Point, ...]:
    """The tensors to round, for everyone but the layers that stay float."""
    kept_float = {op.name for op in graph.ops if op.has_weight and op.layer not in layers}
    points = [replace(point, readers=tuple(name for name in point.readers if name not in kept_float)) for point in place(graph.ops)]
    there = {point.tensor for point in points if point.readers}
    return tuple(point if point.like in there else replace(point, like=None) for point in points if point.readers)


def _bits(job: GraphJob, points: Iterable[Point], scheme_of_op: Mapping[str, Scheme]) -> dict[str, int]:
    """The bits of each tensor: the most that a layer among its readers asks for; tensors of one grid have the same."""
    found: dict[str, int] = {}
    for point in points:
        asked = [scheme_of_op[name].activation_bits for name in point.readers if name in scheme_of_op]
        root = point.like or point.tensor
        found[root] = max([*asked, found.get(root, 0)], default=0)
    return {root: bits or job.scheme.activation_bits for root, bits in found.items()}
