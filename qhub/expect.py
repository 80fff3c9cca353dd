"""What a run is expected to take, and what it took: estimates, corrected by the history of this machine, beside measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qhub import history
from qhub.history import Entry, key_of
from qhub.prove.report import Report
from qhub.route.host import detect
from qhub.route.registry import HOST
from qhub.types import ModelProfile, Recipe, Route


@dataclass(frozen=True)
class Expectation:
    """One figure before the run. `value` is what is expected, None if nothing tells; `plain` is what arithmetic alone says.

    Of "seconds" (of quantizing) arithmetic knows no value: `plain` is the work, in weights × (tokens + 1).
    """

    what: str  # "weight_bytes", "peak_bytes", "seconds", "tokens_per_s"
    value: float | None
    plain: float
    key: str
    basis: str


def expect(found: ModelProfile, recipe: Recipe, plain: Mapping[str, float | None], engine: str) -> tuple[Expectation, ...]:
    """What quantizing by `recipe` will take on this machine; `plain` are the sizes that `preflight.estimate` says."""
    key, work = _key(found, recipe, engine)
    peak = float(plain["peak_bytes"] or 0)
    earlier = history.load()
    here = history.machine() if earlier else ""
    memory, time = (history.correction(earlier, here, what, key) for what in ("peak_bytes", "seconds"))
    return (
        Expectation("weight_bytes", plain["weight_bytes"], float(plain["weight_bytes"] or 0), key, "shapes and bits"),
        Expectation("peak_bytes", peak, peak, key, "shapes and samples")
        if memory is None
        else Expectation("peak_bytes", round(peak * memory.factor), peak, key, f"corrected by {memory.basis}"),
        Expectation("seconds", None, work, key, "unknown before a first run on this machine")
        if time is None
        else Expectation("seconds", work * time.factor, work, key, f"from {time.basis}"),
    )


def engine_of(device: str, *, bounded: bool) -> str:
    """What computes, for runs to be alike: without an accelerator `auto` is the processor; a bound on memory changes what is kept."""
    name = "cpu" if device == "auto" and not detect().accelerators else device
    return f"{name} bounded" if bounded else name


def _key(found: ModelProfile, recipe: Recipe, engine: str) -> tuple[str, float]:
    """Which runs are alike, and the work of this one."""
    tokens = 0 if recipe.calibration is None else recipe.calibration.samples * recipe.calibration.seq_len
    weights = sum(math.prod(layer.shape) for layer in found.linears())
    options = [f"+{name}.{key}={value}" for name, given in sorted(recipe.options.items()) for key, value in sorted(given.items())]
    return key_of("".join([recipe.method, *options]), recipe.scheme, engine, weights, tokens), float(weights * (tokens + 1))


def expect_speed(recipe: Recipe, route: Route) -> tuple[Expectation, ...]:
    """The route's decoding speed, where this machine is the one to decode."""
    speed = route.estimates.tokens_per_s
    if recipe.target != HOST or recipe.runtime is None or speed is None:
        return ()
    key = key_of(recipe.runtime, recipe.scheme, "decode", route.estimates.weight_bytes or 0)
    return (Expectation("tokens_per_s", speed, speed, key, route.estimates.basis),)


def learned(report: Report, expected: Sequence[Expectation]) -> tuple[Entry, ...]:
    """What the history is to remember of a run: of each figure that depends on the machine, the plain estimate and the measurement."""
    here = history.machine()
    measured = {name: row.measured for name, row in report.estimate.items()}
    return tuple(
        Entry(here, item.what, item.key, item.plain, float(value))
        for item in expected
        if item.what != "weight_bytes" and (value := measured.get(item.what)) is not None
    )


def read(rows: Any) -> tuple[Expectation, ...]:  # noqa: ANN401 - JSON
    """The expectations that a run wrote down at its beginning."""
    return tuple(Expectation(**row) for row in rows)
