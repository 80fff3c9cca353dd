"""Static rounding: weights and tensors on grids that calibration fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qhub import ActivationGrid, Graph, Op, Quantization
from qhub_ptq.calibration import Calibration, not_finite
from qhub_ptq.histogram import Histogram, histograms
from qhub_ptq.layers import round_layers
from qhub_ptq.moments import round_on
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan
from qhub_ptq.ranges import RANGES, grid_of


def round_static(graph: Graph, plan: Plan, data: Calibration) -> Quantization:
    """How `graph` is rounded.

    :raises QhubError: when a tensor holds a number that is not finite.
    """
    activations = grids(_histograms(graph, plan, data), plan, data.settings)

    def reading(op: Op, x: torch.Tensor) -> torch.Tensor:
        return round_on(activations.get(plan.input_of.get(op.name, "")), x)

    start = Quantization(activations=activations, readers={point.tensor: point.readers for point in plan.points})
    return round_layers(graph, plan, data, reading, start)


def read_static(tensor: str, batches: Sequence[torch.Tensor], plan: Plan, settings: Settings) -> list[torch.Tensor]:
    """Batches of a tensor as they are read back, on a grid for themselves."""
    found = Histogram()
    for x in batches:
        found.add(x)
    grid = grid_for(found, plan.bits[plan.root[tensor]], settings)
    return [round_on(grid, x) for x in batches]


def grids(found: Mapping[str, Histogram], plan: Plan, settings: Settings) -> dict[str, ActivationGrid]:
    """The grid of every rounded tensor."""
    own = {tensor: grid_for(found[tensor], plan.bits[tensor], settings) for tensor in plan.own}
    return {point.tensor: own[plan.root[point.tensor]] for point in plan.points}


def grid_for(found: Histogram, bits: int, settings: Settings) -> ActivationGrid:
    """The grid for numbers that lie so."""
    return grid_of(RANGES[settings.range](found, bits, symmetric=settings.symmetric), bits, symmetric=settings.symmetric)


def _histograms(graph: Graph, plan: Plan, data: Calibration) -> dict[str, Histogram]:
    try:
        return histograms(data.watch(graph, plan.own))
    except ValueError as error:
        raise not_finite(graph, str(error)) from None
