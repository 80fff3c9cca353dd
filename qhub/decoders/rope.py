"""Rotary position embeddings: the frequencies that transformers' `rope_parameters` (or `rope_scaling`) name.

Sources: Su et al. 2021 (default); Llama 3.1's config (llama3); Peng et al. 2023, YaRN; transformers `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.errors import Unsupported

Table = tuple[NDArray[np.float32], float]


def rope_table(parameters: Mapping[str, Any], dim: int, context: int, engine: str) -> Table:
    """(frequencies (half,) float32, factor of cosine and sine) of a head of `dim` numbers; errors name `engine`.

    :raises Unsupported: when the kind of scaling is not one of default, linear, llama3 and yarn.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    turned = int(dim * float(parameters.get("partial_rotary_factor", 1.0)))
    base = float(parameters.get("rope_theta", 10000.0))
    if not 0 < base < math.inf or turned < 2:
        message = f"rope_theta `{base}` over {turned} numbers of a head"
        raise ValueError(message)
    frequencies = 1.0 / (base ** (np.arange(0, turned, 2, dtype=np.float64) / turned))
    if kind == "default":
        return frequencies.astype(np.float32), 1.0
    if kind == "linear":
        return (frequencies / float(parameters["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(frequencies, parameters).astype(np.float32), 1.0
    if kind == "yarn":
        return _yarn(frequencies, parameters, turned, context)
    raise Unsupported(f"`{engine}` does not know rope scaling `{kind}`", hint="`--runtime hf` opens it with transformers")


def _llama3(frequencies: NDArray[np.float64], parameters: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long wavelengths are slowed by `factor`, short ones not, those between smoothly."""
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = float(parameters["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * ((1 - smooth) / float(parameters["factor"]) + smooth)


def _yarn(frequencies: NDArray[np.float64], parameters: Mapping[str, Any], turned: int, context: int) -> Table:
    original = float(parameters.get("original_max_position_embeddings") or context)
    factor = float(parameters.get("factor") or context / original)
    base = float(parameters.get("rope_theta", 10000.0))

    def dimension(turns: float) -> float:
        return turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(float(parameters.get("beta_fast") or 32)), dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    ramp = np.clip((np.arange(turned // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    slowed = frequencies * (1 - ramp) + frequencies / factor * ramp
    return slowed.astype(np.float32), _yarn_factor(parameters, factor)


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale and scale_all:
        return _magnitude(factor, float(scale)) / _magnitude(factor, float(scale_all))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
