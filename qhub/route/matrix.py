"""The best route of every device as one row of text: what a person compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qhub.route.registry import Registry
from qhub.route.speed import LOWER_BOUND, UPPER_BOUND
from qhub.types import Recommendation, Route, Target
from qhub.units import human_bytes

RIGHT = ("size", "memory", "tokens/s", "ms", "drop")


def columns(task: str) -> tuple[str, ...]:
    """The columns of `rows`; speed is in tokens per second for language models, else in milliseconds per item."""
    return ("target", "method", "scheme", "finished by", "size", "memory", speed_unit(task), "drop", "fits")


def speed_unit(task: str) -> str:
    """What the column of speeds is called."""
    return "tokens/s" if task == "llm" else "ms"


def rows(found: Recommendation, targets: Sequence[Target], registry: Registry) -> Iterator[tuple[str, ...]]:
    """One row per device, in the order of `targets`; `refused` says why there is no route to some."""
    best: dict[str, Route] = {}
    for route in found.routes:
        best.setdefault(route.target, route)
    for target in targets:
        route_or_none = best.get(target.name)
        if route_or_none is None:
            yield (target.name, *["–"] * 7, "no")
        else:
            yield _row(route_or_none, _finisher(route_or_none, target, found.model.task, registry))


def _row(route: Route, finisher: str) -> tuple[str, ...]:
    expected = route.estimates
    size, memory = human_bytes(expected.weight_bytes), human_bytes(expected.peak_bytes)
    return (route.target, route.method, route.scheme, finisher, size, memory, speed(route), drop(route), "yes" if route.fits else "no")


def speed(route: Route) -> str:
    """Tokens per second, or milliseconds per item; a bound where overhead counts most."""
    expected = route.estimates
    value = expected.tokens_per_s or expected.latency_ms
    if value is None:
        return "–"
    bound = "≤ " if UPPER_BOUND in expected.basis else "≥ " if LOWER_BOUND in expected.basis else ""
    return f"{bound}{value:{',.0f' if value >= 100 else '.2g'}}"


def drop(route: Route) -> str:
    """The expected accuracy drop."""
    value = route.estimates.accuracy_drop_pct
    return "–" if value is None else f"{value:.2g} %"


def _finisher(route: Route, target: Target, task: str, registry: Registry) -> str:
    if route.runtime is not None:
        return route.runtime
    finishers = registry.finishers(target, task)
    return f"{finishers[0].name} (missing)" if finishers else "–"


def refused(found: Recommendation, targets: Sequence[Target]) -> Iterator[str]:
    """Why no route leads to some of the devices."""
    reached = {route.target for route in found.routes}
    for target in targets:
        if target.name not in reached:
            yield next(
                (item.reason for item in found.rejected if item.route.startswith(f"{target.name}: ")), f"no route to `{target.name}`"
            )
