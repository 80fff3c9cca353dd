"""Where training starts: scales of least squared error on the float network's weights and tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qhub import ActivationGrid, Batch, Graph, QhubError, Scheme, search_grid
from qhub_qat.plan import Plan

_KEPT = 1 << 15  # numbers of a tensor from one batch
_SHARES = 40
_LEAST = 2.0**-24


def weight_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight (N, …) → the symmetric scale (N,) of least squared error."""
    rows = weight.reshape(len(weight), -1)
    return search_grid(rows, Scheme(bits), torch.float32, torch.ones(rows.shape[1])).scale[:, 0]


def activation_grids(graph: Graph, plan: Plan, batches: Iterable[Batch]) -> dict[str, ActivationGrid]:
    """The grid of every tensor that has its own, from what the float network makes of `batches`.

    :raises QhubError: naming the tensor, when one holds a number that is not finite.
    """
    seen: dict[str, list[torch.Tensor]] = {tensor: [] for tensor in plan.bits}
    for batch in batches:
        for name, tensor in graph.watch(batch, tuple(plan.bits)):
            seen[name].append(_some(tensor.float(), name))
    return {tensor: activation_grid(torch.cat(parts), plan.bits[tensor]) for tensor, parts in seen.items()}


def _some(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """At most `_KEPT` of a tensor's numbers, evenly spread, with the extremes among them."""
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        message = f"tensor `{name}` of the float network holds numbers that are not finite"
        raise QhubError(message, hint="check the data and their preprocessing")
    flat = tensor.reshape(-1)
    return torch.cat([flat[:: -(-len(flat) // _KEPT)], torch.stack([low, high])])


def activation_grid(values: torch.Tensor, bits: int) -> ActivationGrid:
    """The grid of least squared error among shrunken ranges of `values`; it holds zero exactly."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    grids = [_grid(low * share, high * share, bits) for share in torch.linspace(0.2, 1.0, _SHARES).tolist()]
    return min(grids, key=lambda grid: _error(values, grid))


def _grid(low: float, high: float, bits: int) -> ActivationGrid:
    top = (1 << bits) - 1
    scale = float(torch.tensor(max((high - low) / top, _LEAST), dtype=torch.float32))
    return ActivationGrid(scale, min(max(round(-low / scale), 0), top), bits)


def _error(values: torch.Tensor, grid: ActivationGrid) -> float:
    top = (1 << grid.bits) - 1
    rounded = ((values / grid.scale).round_().add_(grid.zero).clamp_(0, top).sub_(grid.zero)).mul_(grid.scale)
    return float(rounded.sub_(values).square_().sum())
