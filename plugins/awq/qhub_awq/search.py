"""AWQ's search for input scales as pure functions. Source: AWQ, arXiv 2306.00978, §3.2; duo scaling: AutoAWQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qhub import Scheme, output_loss, quantize_rtn

ROWS = 512  # rows of a single layer on which candidates are judged


def candidate(input_magnitude: torch.Tensor, weight_magnitude: torch.Tensor, power: float, *, duo: bool) -> torch.Tensor:
    """The input scale xᵃ, or with `duo` xᵃ / w¹⁻ᵃ, for a = `power`; (K,), normalised to a geometric middle of 1."""
    x = (input_magnitude / input_magnitude.mean().clamp_min(1e-12)).clamp_min(1e-4).pow(power)
    return normalised(x / weight_magnitude.clamp_min(1e-4).pow(1 - power) if duo else x)


def normalised(scale: torch.Tensor) -> torch.Tensor:
    """`scale` divided by √(max·min), kept within 2⁻¹⁰ … 2¹⁰."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(2.0**-10, 2.0**10)


def weight_magnitude(weights: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme]) -> torch.Tensor:
    """Mean over rows of |w| relative to its group's maximum, (K,)."""
    parts = []
    for name, weight in weights.items():
        size = schemes[name].group_size or weight.shape[1]
        grouped = weight.abs().reshape(len(weight), -1, size)
        parts.append((grouped / grouped.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(weight.shape))
    return torch.cat(parts).mean(0)


def rounded(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) after scaling its inputs, rounding to nearest and scaling back."""
    return quantize_rtn(weight * scale, scheme, dtype).dequantize() / scale


def single_layer_loss(weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Callable[[torch.Tensor], float]:
    """The exact output error of one layer as a function of its input scale, on at most `ROWS` evenly spaced rows."""
    rows = weight[:: max(1, len(weight) // ROWS)]
    return lambda scale: float(output_loss(rounded(rows, scale, scheme, dtype) - rows, gram).mean())


def best_scale(loss: Callable[[torch.Tensor], float], at: Callable[[float, bool], torch.Tensor], steps: int) -> torch.Tensor | None:
    """The candidate `at`(power, duo) of least loss, or None when none beats the identity.

    Every second of the powers 1/steps … 1 is tried, then the neighbours of the best.
    """
    losses: dict[tuple[int, bool], float] = {}

    def judge(step: int, *, duo: bool) -> None:
        if 0 < step <= steps - duo:  # at 1 both are the same
            losses[step, duo] = loss(at(step / steps, duo))

    for duo in (False, True):
        for step in range(steps - duo, 0, -2):
            judge(step, duo=duo)
    nearest, duo = min(losses, key=losses.__getitem__)
    for step in (nearest - 1, nearest + 1):
        judge(step, duo=duo)
    step, duo = min(losses, key=losses.__getitem__)
    best = at(step / steps, duo)
    return best if losses[step, duo] < loss(torch.ones_like(best)) else None
