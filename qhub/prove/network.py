"""How much a quantized network lost: accuracy on labelled items, agreement with the float network, divergence, cosine similarity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NEITHER = -100


@dataclass(frozen=True)
class NetworkFigures:
    """What was measured of one network; `kl` (nats), `top1_agreement` and `cosine` are against the float network.

    `accuracy` is the share of right answers; without labels the share of the float network's answers, and for embeddings the mean
    cosine similarity to the float network's: the float network then has 1.
    """

    accuracy: float
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    perplexity: None = None


@dataclass
class _Sums:
    items: int = 0
    answers: int = 0
    right_float: int = 0
    right: int = 0
    agreed: int = 0
    kl: float = 0.0
    cosine: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """The float and the quantized network on the same items; `metric` says what accuracy is."""

    metric: str
    float_figures: NetworkFigures
    figures: NetworkFigures

    @property
    def drop_pct(self) -> float:
        """Accuracy drop in percent of the float network's accuracy."""
        before, after = self.float_figures.accuracy, self.figures.accuracy
        return 100.0 * (before - after) / before if before > 0 else 0.0


def compare(outputs: Iterable[tuple[Array, Array]], labels: Iterator[Array] | None, *, embedding: bool) -> Comparison:
    """Compare pairs of (float, quantized) outputs of the same batches, (B, C) or (B, T, C) logits or (B, H) embeddings.

    A token that is only padding has no label, so it counts only where there are no labels at all.
    """
    sums = _Sums()
    for expected, found in outputs:
        _count(sums, expected.astype(np.float64), found.astype(np.float64), None if labels is None else next(labels), embedding=embedding)
    items, answers = max(sums.items, 1), max(sums.answers, 1)
    cosine = sums.cosine / items
    if embedding:
        return Comparison("cosine", NetworkFigures(1.0, cosine=1.0), NetworkFigures(cosine, cosine=cosine))
    agreement = sums.agreed / answers
    right = (sums.right_float / answers, sums.right / answers) if labels is not None else (1.0, agreement)
    metric = "accuracy" if labels is not None else "agreement"
    return Comparison(metric, NetworkFigures(right[0]), NetworkFigures(right[1], sums.kl / answers, agreement, cosine))


def _count(sums: _Sums, expected: Array, found: Array, labels: Array | None, *, embedding: bool) -> None:
    sums.items += len(expected)
    sums.cosine += float(_cosines(expected.reshape(len(expected), -1), found.reshape(len(found), -1)).sum())
    if embedding:
        return
    classes = expected.shape[-1]
    before, after = expected.reshape(-1, classes), found.reshape(-1, classes)
    if labels is not None:
        flat = labels.reshape(-1)
        there = flat != NEITHER
        before, after, wanted = before[there], after[there], flat[there]
        sums.right_float += int((before.argmax(-1) == wanted).sum())
        sums.right += int((after.argmax(-1) == wanted).sum())
    sums.answers += len(before)
    sums.agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
    one, other = _log_softmax(before), _log_softmax(after)
    sums.kl += float((np.exp(one) * (one - other)).sum())


def _cosines(one: Array, other: Array) -> Array:
    """Cosine similarity of each row; 1 where both are zero."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = (one * other).sum(1)
    found: Array = np.where(lengths > 0, products / np.maximum(lengths, 1e-300), np.where((one == other).all(1), 1.0, 0.0))
    return found


def _log_softmax(values: Array) -> Array:
    shifted = values - values.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
