"""Rounding that learns: step sizes are parameters (LSQ, arXiv 1902.08153), rounding itself passes gradients on unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LEAST = 2.0**-24


class _Round(torch.autograd.Function):
    """x → (clamp(round(x / scale) + zero, low, high) − zero) · scale.

    `reduce` are the axes that one scale stands for; `share` scales its gradient. Inside the range the gradient of the scale is
    round(v) − v for v = x / scale, outside it is the bound.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - as torch gives it
        x: torch.Tensor,
        scale: torch.Tensor,
        bounds: tuple[int, int],
        reduce: tuple[int, ...],
        share: float,
    ) -> torch.Tensor:
        v = x * (1 / scale)
        codes = v.round().clamp_(*bounds)
        ctx.save_for_backward(v, codes)
        ctx.scale, ctx.reduce, ctx.share = scale, reduce, share
        return codes * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:  # type: ignore[override]  # noqa: ANN401
        v, codes = ctx.saved_tensors
        inside = (codes - v).abs_().le_(0.5)
        to_x = gradient * inside
        to_scale = codes.mul(gradient).sub_(v.mul_(to_x)).sum(ctx.reduce, keepdim=True)
        return to_x, to_scale.reshape(ctx.scale.shape) * ctx.share, None, None, None


class WeightStep(nn.Module):
    """Rounds a weight (N, …) symmetrically, one learned scale (N,) per output; codes −(2**(bits − 1) − 1) … 2**(bits − 1) − 1."""

    def __init__(self, scale: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.clone())
        self.bits = bits

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def step(self) -> torch.Tensor:
        """The scale (N,), positive whatever a training loop made of the parameter."""
        return self.scale.abs().clamp_min(_LEAST)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as its codes will stand for it."""
        shape = (-1, *(1,) * (weight.dim() - 1))
        share = (weight[0].numel() * self.top) ** -0.5
        made: torch.Tensor = _Round.apply(weight, self.step().reshape(shape), (-self.top, self.top), tuple(range(1, weight.dim())), share)  # type: ignore[no-untyped-call]
        return made


class ActivationStep(nn.Module):
    """Rounds a tensor on one learned scale; the zero stays where the first range put it."""

    def __init__(self, scale: float, zero: int, bits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.zero, self.bits = zero, bits

    def step(self) -> torch.Tensor:
        """The scale (), positive whatever a training loop made of the parameter."""
        return self.scale.abs().clamp_min(_LEAST)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as its codes will stand for it."""
        low, high = -self.zero, (1 << self.bits) - 1 - self.zero
        share = (max(x[0].numel(), 1) * max(high, -low)) ** -0.5
        made: torch.Tensor = _Round.apply(x, self.step(), (low, high), tuple(range(x.dim())), share)  # type: ignore[no-untyped-call]
        return made
