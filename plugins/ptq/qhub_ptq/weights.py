"""The codes of a layer's weight: one scale per output, symmetric, no code below −(2**(bits−1) − 1), as every int8 kernel takes it."""

from __future__ import annotations

from dataclasses import replace

import torch

from qhub import QTensor, Scheme, minmax_grid, on_grid, search_grid
from qhub_ptq.feedback import best_weight, round_with_feedback
from qhub_ptq.moments import Moments

_HALVES_PRODUCTS = 63 / 127  # of reduced range: two products of 8 bits then fit into 16
_ENOUGH = 4  # rows of inputs for each column: with fewer, other weights would fit what chance says


def round_weight(weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None, *, reduce_range: bool = False) -> QTensor:
    """weight (N, …) float32 → codes (N, K). At 8 bits nothing is clipped; below, the range of least squared error is searched.

    importance (K,) weighs the error of each input. `reduce_range` leaves the largest codes of 8 bits unused.
    """
    rows = weight.reshape(len(weight), -1)
    scheme = Scheme(bits)
    if bits < 8:
        grid = search_grid(rows, scheme, torch.float32, torch.ones(rows.shape[1]) if importance is None else importance)
    else:
        grid = minmax_grid(rows / _HALVES_PRODUCTS if reduce_range else rows, scheme, torch.float32)
    found = on_grid(rows, grid, scheme)
    return replace(found, codes=found.codes.clamp_min(1))


def round_for_inputs(weight: torch.Tensor, bits: int, moments: Moments) -> QTensor:
    """weight (N, …) → codes (N, K) of least output error on the inputs that `moments` describes."""
    assert moments.gram is not None
    assert moments.cross is not None
    groups, inputs = moments.gram.shape[:2]
    parts = []
    for index, rows in enumerate(weight.reshape(len(weight), -1).chunk(groups)):
        gram, cross = moments.gram[index] / moments.rows, moments.cross[index] / moments.rows
        wanted = best_weight(rows, gram, cross) if moments.rows >= _ENOUGH * inputs else rows
        parts.append(round_with_feedback(wanted, round_weight(wanted, bits, gram.diagonal()), gram))
    codes, scale, zero = (torch.cat(every) for every in zip(*((one.codes, one.scale, one.zero) for one in parts), strict=True))
    return QTensor(codes, scale, zero, bits, True)


def real(weight: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """The weight that the codes stand for, in the shape of `weight`."""
    return tensor.dequantize().reshape(weight.shape)
