"""AWQ's search for input scales as pure functions. Source: AWQ, arXiv 2306.00978, §3.2; duo scaling: AutoAWQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from qhub import Scheme, output_loss, quantize_rtn

ROWS = 512  # rows of a single layer on which candidates are judged


def candidates(input_magnitude: torch.Tensor, weight_magnitude: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Input scales (K,) to try: xᵃ and xᵃ / w¹⁻ᵃ for a = 1/steps … 1, each normalised to a geometric middle of 1."""
    x = (input_magnitude / input_magnitude.mean().clamp_min(1e-12)).clamp_min(1e-4)
    w = weight_magnitude.clamp_min(1e-4)
    for step in range(1, steps + 1):
        power = step / steps
        yield normalised(x.pow(power))
        if step < steps:
            yield normalised(x.pow(power) / w.pow(1 - power))


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


def best_scale(
    loss: Callable[[torch.Tensor], float], tried: Iterator[torch.Tensor], tie: Callable[[torch.Tensor], torch.Tensor], inputs: int
) -> torch.Tensor | None:
    """The candidate of least loss, or None when none beats the identity."""
    best, least = None, loss(torch.ones(inputs))
    for scale in tried:
        scale = tie(scale)
        value = loss(scale)
        if value < least:
            best, least = scale, value
    return best
