"""The codes of a layer's weight: one scale per output, symmetric, no code below −(2**(bits−1) − 1), as every int8 kernel takes it."""

from __future__ import annotations

from dataclasses import replace

import torch

from qhub import QTensor, Scheme, minmax_grid, on_grid, search_grid


def round_weight(weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> QTensor:
    """weight (N, …) float32 → codes (N, K). At 8 bits nothing is clipped; below, the range of least squared error is searched.

    importance (K,) weighs the error of each input.
    """
    rows = weight.reshape(len(weight), -1)
    scheme = Scheme(bits)
    if bits == 8:
        found = on_grid(rows, minmax_grid(rows, scheme, torch.float32), scheme)
    else:
        grid = search_grid(rows, scheme, torch.float32, torch.ones(rows.shape[1]) if importance is None else importance)
        found = on_grid(rows, grid, scheme)
    return replace(found, codes=found.codes.clamp_min(1))
