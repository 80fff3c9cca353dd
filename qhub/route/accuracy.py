"""The accuracy drop to expect before anything ran: published losses by precision, type of model and method. A run measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qhub.types import Family, ModelProfile, Scheme, Task

#: How well each type of model takes fewer bits.
TOLERANCE: Mapping[Task, str] = {
    "vision": "high",
    "detection": "medium-high",
    "nlp": "medium",
    "llm": "medium",
    "speech": "high",
    "embedding": "low-medium",
    "generative": "low-medium",
    "unknown": "low-medium",
}
#: The usual loss in percent: int8 costs 1 to 3, int4 without groups 3 to 5, training with quantization less than 1.
_INT8_PCT = {"high": 1.0, "medium-high": 1.5, "medium": 2.0, "low-medium": 3.0}
_INT4_PCT = {"high": 3.0, "medium-high": 3.5, "medium": 4.0, "low-medium": 5.0}
_QAT_LIMIT_PCT = 1.0
#: Language models, weights only, in percent of next-token accuracy: bits → loss with calibration data, and by what it is known.
_WEIGHT_ONLY_PCT: Mapping[int, tuple[float, str]] = {
    8: (0.1, "llama.cpp Q8_0: perplexity +0.02 %"),
    6: (0.2, "llama.cpp Q6_K: perplexity +0.1 %"),
    5: (0.4, "llama.cpp Q5_K_M: perplexity +0.2 %"),
    4: (1.0, "int4 in groups stays within 1 % of float, arXiv 2311.00502; older tables say 3 to 5 % for rounding without groups"),
    3: (6.0, "perplexity rises 6 times as much as at 4 bits, AWQ paper, table 4"),
    2: (10.0, "AWQ+GPTQ at 2 bits: perplexity of OPT +60 % and more, AWQ paper; 5 to 10 % in older tables"),
}
#: Rounding without data loses twice as much (perplexity +4.8 % where AWQ has +2.4 %, Llama-2-7B, AWQ paper, table 4).
_NO_DATA_FACTOR = 2.0
#: A small model in groups that are too large for it (OPT-1.3B: perplexity 31.9 per channel, 15.3 in groups of 32, float 14.6).
_LARGE_GROUP_FACTOR = 2.0
#: Up to this size a model loses much to large groups.
SMALL_MODEL_PARAMETERS, SMALL_MODEL_GROUP = 2e9, 32
NF4_PCT = 1.5


@dataclass(frozen=True, slots=True)
class Drop:
    """An expected accuracy drop in percent (None: unknown) and what says so."""

    pct: float | None
    basis: str


def expected_drop(profile: ModelProfile, scheme: Scheme, family: Family, *, uses_data: bool = True) -> Drop:
    """What `profile` is expected to lose at `scheme`; `uses_data`: whether the method calibrates."""
    tolerance = TOLERANCE[profile.task]
    if scheme.is_float:
        return _float_drop(profile, scheme)
    if family == "qat":
        pct = min(_INT8_PCT[tolerance] / 2, _QAT_LIMIT_PCT)
        return Drop(pct, "trained with quantization: at most half of what it costs afterwards, and below 1 %")
    if scheme.activation != "float":
        return _activations_drop(profile, scheme, tolerance)
    if scheme.name == "nf4":
        return Drop(NF4_PCT, "NF4 without data lies between rounding and calibrated int4")
    return _weights_drop(profile, scheme, tolerance, uses_data=uses_data)


def _float_drop(profile: ModelProfile, scheme: Scheme) -> Drop:
    if profile.dtype == str(scheme):
        return Drop(0.0, f"the weights are {profile.dtype} already")
    return Drop(0.1, f"{profile.dtype} → {scheme} costs about 0.1 %")


def _activations_drop(profile: ModelProfile, scheme: Scheme, tolerance: str) -> Drop:
    if scheme.weight_bits < 8 or scheme.activation_bits < 8:
        return Drop(None, "unknown for activations below 8 bits")
    if profile.task == "llm" and scheme.activation == "dynamic":
        return Drop(0.8, "int8 weights and activations: perplexity of Llama-2-7B +0.8 %, SmoothQuant")
    return Drop(_INT8_PCT[tolerance], f"int8 costs 1 to 3 %; tolerance of {_kind(profile)} models: {tolerance}")


def _weights_drop(profile: ModelProfile, scheme: Scheme, tolerance: str, *, uses_data: bool) -> Drop:
    if profile.task != "llm" and scheme.weight_bits <= 4:
        return Drop(_INT4_PCT[tolerance], f"int4 costs 3 to 5 %; tolerance of {_kind(profile)} models: {tolerance}")
    bits = max(known for known in _WEIGHT_ONLY_PCT if known <= scheme.weight_bits)
    pct, basis = _WEIGHT_ONLY_PCT[bits]
    if bits < 8 and not uses_data:
        pct, basis = pct * _NO_DATA_FACTOR, f"{basis}; without calibration data twice that"
    small = profile.parameters <= SMALL_MODEL_PARAMETERS
    group = scheme.group_size or profile.hidden_size or SMALL_MODEL_GROUP + 1
    if bits < 8 and (scheme.group_size is None or (small and group > SMALL_MODEL_GROUP)):
        pct, basis = pct * _LARGE_GROUP_FACTOR, f"{basis}; large groups double it"
    return Drop(round(pct, 2), basis)


def _kind(profile: ModelProfile) -> str:
    return profile.task if profile.task != "unknown" else "unknown (taken as sensitive)"
