"""Drawing a token from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def drawn(logits: NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token by its logits (V): the most probable one at temperature 0, else one of those that have `top_p` together."""
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")
    sums = np.cumsum(probabilities[best])
    kept = best[: int(np.searchsorted(sums, top_p)) + 1]
    shares = probabilities[kept] / probabilities[kept].sum()
    return int(random.choice(kept, p=shares))
