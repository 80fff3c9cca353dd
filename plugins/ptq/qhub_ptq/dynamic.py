"""Dynamic rounding: the weights of linear layers once, what they read row by row while they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qhub import Graph, Op, Quantization
from qhub_ptq.calibration import Calibration
from qhub_ptq.layers import round_layers
from qhub_ptq.options import Settings
from qhub_ptq.plan import Plan

_STEPS = 255


def round_dynamic(graph: Graph, plan: Plan, data: Calibration) -> Quantization:
    """How `graph` is rounded."""
    return round_layers(graph, plan, data, _reading, Quantization(dynamic=frozenset(plan.layers)))


def read_dynamic(tensor: str, batches: Sequence[torch.Tensor], plan: Plan, settings: Settings) -> list[torch.Tensor]:
    """Batches of a tensor as they are read back."""
    return [round_rows(x) for x in batches]


def _reading(op: Op, x: torch.Tensor) -> torch.Tensor:
    return round_rows(x)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x (…, K) with each row on the 8-bit grid that holds all of it, and zero exactly."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / _STEPS).clamp_min(torch.finfo(torch.float32).eps)
    zero = (-low / scale).round()
    return ((x / scale).round_().add_(zero).clamp_(0, _STEPS).sub_(zero)).mul_(scale)
