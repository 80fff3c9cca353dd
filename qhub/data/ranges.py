"""Do calibration and evaluation feed the same values? Statistics of inputs in one pass, and what their difference means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Spread or offset by which two samples of the same data do not differ, as multiples of the calibrated ones.
_FAR_SPREAD, _FAR_SHIFT = 3.0, 3.0
_FAR_OUTSIDE = 1.0  # calibrated spans beyond the calibrated range


@dataclass(frozen=True, slots=True)
class InputRange:
    """What an input's values are: extremes, mean and standard deviation of the finite ones, and how many are NaN or infinite."""

    low: float
    high: float
    mean: float
    std: float
    count: int
    not_finite: int = 0

    @property
    def span(self) -> float:
        """`high − low`."""
        return self.high - self.low


def collect_ranges(batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, InputRange]:
    """Statistics of every floating-point input over all batches, in one pass; whole numbers (ids, masks) are left out."""
    found: dict[str, InputRange] = {}
    for batch in batches:
        for name, values in batch.items():
            if np.issubdtype(values.dtype, np.floating):
                piece = range_of(values)
                found[name] = merge(found[name], piece) if name in found else piece
    return found


def range_of(values: NDArray[Any]) -> InputRange:
    """Statistics of one array, in float64."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return InputRange(math.inf, -math.inf, 0.0, 0.0, 0, values.size)
    low, high, mean, std = (float(each) for each in (finite.min(), finite.max(), finite.mean(), finite.std()))
    return InputRange(low, high, mean, std, finite.size, values.size - finite.size)


def merge(one: InputRange, other: InputRange) -> InputRange:
    """Statistics of both sets of values together (Chan et al. 1979)."""
    count = one.count + other.count
    if not count:
        return InputRange(math.inf, -math.inf, 0.0, 0.0, 0, one.not_finite + other.not_finite)
    share, shift = other.count / count, other.mean - one.mean
    variance = (1 - share) * one.std**2 + share * other.std**2 + share * (1 - share) * shift**2
    extremes = min(one.low, other.low), max(one.high, other.high)
    return InputRange(*extremes, one.mean + share * shift, math.sqrt(variance), count, one.not_finite + other.not_finite)


def compare_ranges(calibration: Mapping[str, InputRange], evaluation: Mapping[str, InputRange]) -> list[str]:
    """One sentence or two for each input whose evaluated values lie far from the calibrated ones; empty where they match.

    Quantized ranges follow the calibration: what lies outside is clipped, and a range that is far too wide leaves few steps.
    """
    said = [f"`{name}` is calibrated and not evaluated" for name in calibration if name not in evaluation]
    said += [f"`{name}` is evaluated and was not calibrated" for name in evaluation if name not in calibration]
    for name in calibration:
        if name in evaluation:
            said += _compared(name, calibration[name], evaluation[name])
    return said


def _compared(name: str, calibrated: InputRange, evaluated: InputRange) -> list[str]:
    for which, found in (("calibration", calibrated), ("evaluation", evaluated)):
        if found.not_finite:
            return [f"`{name}` holds {found.not_finite} values that are NaN or infinite in the {which} data; take those items out"]
    if not calibrated.count or not evaluated.count:
        return []
    cause = _cause(calibrated, evaluated)
    if cause is None:
        return []
    said = f"`{name}` was calibrated on {_said(calibrated)} and is evaluated on {_said(evaluated)}"
    return [f"{said}: {cause}"]


def _cause(calibrated: InputRange, evaluated: InputRange) -> str | None:
    """Why the two differ, and what to do; None where they do not."""
    if not _far(calibrated, evaluated):
        return None
    raw = [_is_raw(calibrated), _is_raw(evaluated)]
    if raw[0] != raw[1]:
        which, other = ("calibration", "evaluation") if raw[0] else ("evaluation", "calibration")
        return f"the {which} data look like pixels 0 .. 255 that were not rescaled; feed both as the {other} data are (`scale`: 1/255)"
    unit = [_is_unit(calibrated), _is_unit(evaluated)]
    if unit[0] != unit[1]:
        which = "calibration" if unit[0] else "evaluation"
        return f"the {which} data are rescaled but not normalised; give both the same `mean` and `std`"
    if evaluated.std < calibrated.std / _FAR_SPREAD and evaluated.span < calibrated.span / _FAR_SPREAD:
        return "the evaluated values use few of the quantized steps; give both data the same preprocessing"
    if _outside(calibrated, evaluated) > _FAR_OUTSIDE and not _moved(calibrated, evaluated):
        return "single values lie far outside and will be clipped; calibrate on more items, or look for outliers"
    return "values outside the calibrated range are clipped; give both data the same preprocessing, or calibrate on data like these"


def _far(calibrated: InputRange, evaluated: InputRange) -> bool:
    return _moved(calibrated, evaluated) or _outside(calibrated, evaluated) > _FAR_OUTSIDE


def _moved(calibrated: InputRange, evaluated: InputRange) -> bool:
    """Whether mean or spread are those of other data; a spread of 0 compares with the values' own size."""
    least = 1e-6 * max(abs(calibrated.low), abs(calibrated.high), abs(evaluated.low), abs(evaluated.high), 1e-30)
    one, other = max(calibrated.std, least), max(evaluated.std, least)
    return max(one, other) > _FAR_SPREAD * min(one, other) or abs(evaluated.mean - calibrated.mean) > _FAR_SHIFT * one


def _outside(calibrated: InputRange, evaluated: InputRange) -> float:
    """How far evaluated values lie outside the calibrated range, in calibrated spans."""
    beyond = max(calibrated.low - evaluated.low, evaluated.high - calibrated.high, 0.0)
    return beyond / max(calibrated.span, 1e-30) if beyond else 0.0


def _is_raw(found: InputRange) -> bool:
    """Pixels of bytes: from 0 up to 255, and more than a few of them."""
    return found.low >= 0 and 32 < found.high <= 255.5 and found.mean > 2


def _is_unit(found: InputRange) -> bool:
    """Pixels rescaled to 0 .. 1."""
    return found.low >= 0 and found.high <= 1.0 + 1e-6


def _said(found: InputRange) -> str:
    return f"{found.low:.3g} .. {found.high:.3g} (mean {found.mean:.3g}, deviation {found.std:.3g})"
