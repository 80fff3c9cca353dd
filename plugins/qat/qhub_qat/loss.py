"""How far a rounded network is from the float one, and from the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

NEITHER = -100  # the label of a token that none is asked for
EMBEDDING = "embedding"


def first(outputs: Any) -> torch.Tensor:  # noqa: ANN401 - whatever a network gives
    """The first output."""
    found = next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    assert isinstance(found, torch.Tensor)
    return found


def distance(made: torch.Tensor, wanted: torch.Tensor, *, embedding: bool) -> torch.Tensor:
    """Mean KL divergence (nats) of logits (…, C) from the float network's; of embeddings the mean squared distance."""
    if embedding:
        return (made - wanted).square().sum(-1).mean()
    rows, targets = made.reshape(-1, made.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    return functional.kl_div(functional.log_softmax(rows, -1), functional.log_softmax(targets, -1), reduction="batchmean", log_target=True)


def against_labels(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of logits (…, C) where there is a label."""
    return functional.cross_entropy(made.reshape(-1, made.shape[-1]), labels.reshape(-1), ignore_index=NEITHER)


def right(made: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """(right, asked) of logits (…, C) by labels."""
    asked = labels != NEITHER
    return int((made.argmax(-1)[asked] == labels[asked]).sum()), int(asked.sum())
