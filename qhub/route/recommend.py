"""Which way: profile × targets × goals × what is installed → ranked routes, each with its reasons, and what was rejected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qhub.errors import NoRouteError
from qhub.interfaces import Quantizer
from qhub.plugins import Plugins
from qhub.route import describe
from qhub.route.accuracy import expected_drop
from qhub.route.answers import fused_experts, int8_family
from qhub.route.describe import named as named
from qhub.route.device import int8_of
from qhub.route.estimate import estimate, unmet
from qhub.route.flowchart import Walk, walk
from qhub.route.left_out import absent, left_out
from qhub.route.precision import default_scheme, family_of, levels, suits
from qhub.route.registry import IndexEntry, Registry, load_registry
from qhub.route.speed import Speed
from qhub.route.ways import Method, Search, Way, ask, methods, not_importable, read_wanted, speed_of, ways
from qhub.types import Estimates, Family, Goals, ModelProfile, Recommendation, Rejected, Route, Scheme, Target


@dataclass(frozen=True, slots=True)
class _Choice:
    """A family of methods for one target: the chart's, or an alternative to it (`rank` > 0)."""

    target: Target
    walk: Walk
    family: Family
    weight_bits: int | None = None
    rank: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pair:
    """Who quantizes and who takes it onto the device; `place` is the method's among those of its family."""

    method: Method
    way: Way
    place: int


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A route with what decides its place: smaller comes first."""

    key: tuple[int, ...]
    route: Route


def recommend(
    profile: ModelProfile,
    targets: Sequence[Target],
    goals: Goals,
    plugins: Plugins,
    *,
    wanted: Sequence[str] = (),
    scheme: Scheme | None = None,
    registry: Registry | None = None,
) -> Recommendation:
    """Rank every route from `profile` to `targets`, best first for each target.

    `wanted` names plugins (or components) that the route must use; `scheme` is forced if given; `registry` is read if not.

    :raises NoRouteError: when there is no route at all. :raises UsageError: when a wanted name is unknown.
    """
    if profile.quantization is not None:
        message = f"`{profile.source}` is already quantized (`{profile.quantization}`); quantizing it again would add to its error"
        raise NoRouteError(message, hint=f"start from the float model; `qhub inspect {profile.path}` says what this one is")
    registry = registry or load_registry()
    search = Search(profile, goals, plugins, registry, read_wanted(wanted, plugins, registry), scheme)
    routes: list[Route] = []
    refused: list[Rejected] = []
    others: list[Rejected] = []
    for target in targets:
        found = [ranked.route for ranked in sorted(_routes(search, target, refused), key=lambda ranked: ranked.key)]
        routes += found
        others += [*absent(target, profile, registry, plugins), *(left_out(search.merged, goals, target, found) if found else ())]
    if not routes:
        raise _no_route(search, targets, refused)
    return Recommendation(profile, goals, tuple(routes), (*refused, *others))


def _no_route(search: Search, targets: Sequence[Target], rejected: Sequence[Rejected]) -> NoRouteError:
    names = ", ".join(f"`{target.name}`" for target in targets)
    why = f": {rejected[0].route}: {rejected[0].reason}" if rejected else ""
    if len(targets) == 1:
        why = why.replace(f": {targets[0].name}: ", ": ", 1)
    more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
    hint = f"`qhub recommend {search.profile.path} --explain` shows every rejected route; `qhub plugins` what is installed"
    return NoRouteError(f"no route from `{search.profile.source}` to {names}{why}{more}", hint=hint)


def _routes(search: Search, target: Target, rejected: list[Rejected]) -> Iterator[_Ranked]:
    walked, fused = walk(search.merged, search.goals, target), fused_experts(search.profile)
    if walked.family is None or fused is not None:
        rejected.append(Rejected(f"{target.name}: none", fused or walked.reasons[-2]))
        return
    for choice in _choices(search, target, walked):
        yield from _of_choice(search, choice, rejected)
    if search.goals.retrain and not search.wanted.quantizers and search.scheme is None:
        yield from _without_retraining(search, target, rejected)


def _without_retraining(search: Search, target: Target, rejected: list[Rejected]) -> Iterator[_Ranked]:
    """The other branch is still a way to go, and the only one where nothing installed trains."""
    served = bool(methods(search.plugins, "qat", search.wanted))
    warning = (
        "this is the branch without retraining" if served else "no installed plugin serves `qat`: this is the branch without retraining"
    )
    without = replace(search, goals=replace(search.goals, retrain=False))
    for choice in _choices(without, target, walk(search.merged, without.goals, target)):
        yield from _of_choice(without, replace(choice, rank=choice.rank + 1, warnings=(warning, *choice.warnings)), rejected)


def _choices(search: Search, target: Target, walked: Walk) -> Iterator[_Choice]:
    """The chart's family, then what comes close to it: another precision for the same device."""
    family = walked.family
    assert family is not None
    if search.wanted.quantizers:
        offered = methods(search.plugins, family, search.wanted)[0]
        last = offered.quantizers[-1]
        yield _asked(target, walked, _family_served(last, family, search.scheme), f"`{offered.name}`")
    elif search.scheme is not None:
        yield _asked(target, walked, family if suits(search.scheme, family) else family_of(search.scheme), f"scheme `{search.scheme}`")
    else:
        yield _Choice(target, walked, family, walked.leaf.weight_bits)
        for other, bits in _alternatives(search.merged, target, family):
            yield _Choice(target, walked, other, bits, rank=1, warnings=(f"the chart leads to `{family}`: this is the alternative",))


def _family_served(quantizer: Quantizer, family: Family, scheme: Scheme | None) -> Family:
    """The family that a wanted method works in: that of the forced scheme, else the chart's, where it serves it; else its own."""
    first = family if scheme is None or suits(scheme, family) else family_of(scheme)
    return first if quantizer.serves(first) else quantizer.family


def _asked(target: Target, walked: Walk, family: Family, who: str) -> _Choice:
    warnings = () if family == walked.family else (f"the chart leads to `{walked.family}`; {who} was asked for",)
    return _Choice(target, walked, family, walked.leaf.weight_bits, warnings=warnings)


def _alternatives(profile: ModelProfile, target: Target, family: Family) -> Iterator[tuple[Family, int | None]]:
    if family in ("static", "dynamic") and profile.task != "llm" and int8_of(target)[0] != "only":
        yield "float16", None
    elif family == "float16" and profile.task == "llm":
        yield "weight-only", 8
    elif family == "float16" and profile.task != "unknown":
        yield int8_family(profile, target), None
    elif family == "dynamic" and profile.task == "llm":
        yield "weight-only", 4


def _of_choice(search: Search, choice: _Choice, rejected: list[Rejected]) -> Iterator[_Ranked]:
    found = methods(search.plugins, choice.family, search.wanted)
    if not found:
        yield from _planned(search, choice)
        return
    open_ways, closed = ways(search, choice.target)
    rejected += [item for item in closed if item not in rejected]
    candidates = [
        ranked
        for place, method in enumerate(found)
        for way in open_ways
        for ranked in _candidate(search, choice, _Pair(method, way, place), rejected)
    ]
    if not candidates and not (search.wanted.exporters or search.wanted.runtimes):  # the QuantizedModel itself is what there is
        missing = tuple(entry.distribution for entry in search.registry.finishers(choice.target, search.profile.task))
        alone = [_Pair(method, Way(missing=missing), place) for place, method in enumerate(found) if method.quantizers[-1].graph]
        candidates = [ranked for pair in alone for ranked in _candidate(search, choice, pair, rejected)]
    yield from candidates


def _candidate(search: Search, choice: _Choice, pair: _Pair, rejected: list[Rejected]) -> Iterator[_Ranked]:
    """The best scheme that method and exporter take and that fits; the smallest if none fits."""
    method, way = pair.method, pair.way
    name = f"{choice.target.name}: {method.name} → {way.name}"
    best: tuple[int, Scheme] | None = None
    for step, level in enumerate(_levels(search, choice, method.quantizers[0].default_scheme)):
        scheme, why = _accepted(search, pair, level)
        if scheme is None:
            rejected.append(Rejected(name, why))
            continue
        expected = _expect(search, choice, scheme, speed_of(way, choice.target), uses_data=method.uses_data)
        broken = unmet(expected, choice.target, search.goals)
        if best is not None:
            rejected.append(Rejected(f"{name} ({best[1]})", "a smaller scheme fits" if not broken else "does not fit"))
        best = (step, scheme)
        if not broken:
            break
    if best is not None:
        route = _route(search, choice, pair, best[1])
        lacks = bool(not_importable(method))
        yield _Ranked(_key(search, choice, route, (lacks, False, not way.finished, pair.place, best[0])), route)


def _key(search: Search, choice: _Choice, route: Route, state: tuple[int, ...]) -> tuple[int, ...]:
    """What fits comes first, then what is installed, then what is expected to keep the accuracy, then the chart's order.

    `state`: (lacks something, is planned, does not finish, place of the method, step of the scheme).
    """
    lacks, planned, unfinished, place, step = state
    drop = route.estimates.accuracy_drop_pct
    misses = drop is None or drop > search.goals.max_drop_pct
    return tuple(map(int, (not route.fits, lacks, misses, choice.rank, planned, unfinished, place, step)))


def _levels(search: Search, choice: _Choice, default: str) -> Iterator[Sequence[Scheme]]:
    if search.scheme is not None:
        return iter([(search.scheme,)])
    scheme = default_scheme(default, choice.family, choice.target)
    return levels(search.merged, choice.target, scheme, choice.weight_bits)


def _accepted(search: Search, pair: _Pair, level: Sequence[Scheme]) -> tuple[Scheme | None, str]:
    """The first scheme of `level` that nobody refuses, or the first reason."""
    first_reason = ""
    for scheme in level:
        why = pair.method.reject(search.profile, scheme)
        if why is None and pair.way.exporter is not None:
            why = ask(pair.way.exporter.reject, search.profile, scheme)
        if why is None:
            return scheme, ""
        first_reason = first_reason or why
    return None, first_reason


def _expect(search: Search, choice: _Choice, scheme: Scheme, speed: Speed, *, uses_data: bool) -> Estimates:
    expected = estimate(search.merged, scheme, choice.target, speed)
    drop = expected_drop(search.merged, scheme, choice.family, uses_data=uses_data)
    loss = "unknown" if drop.pct is None else f"about {drop.pct:g} %"
    basis = f"{expected.basis}; accuracy: {loss}, expected from others' results ({drop.basis}); a run measures it"
    return replace(expected, accuracy_drop_pct=drop.pct, basis=basis)


def _route(search: Search, choice: _Choice, pair: _Pair, scheme: Scheme) -> Route:
    target, method, way = choice.target, pair.method, pair.way
    expected = _expect(search, choice, scheme, speed_of(way, target), uses_data=method.uses_data)
    broken = unmet(expected, target, search.goals)
    return Route(
        target=target.name,
        method=method.name,
        family=choice.family,
        scheme=str(scheme),
        quantizer=method.quantizers[-1].name,
        exporter=way.exporter.name if way.exporter else None,
        runtime=way.runtime.name if way.runtime else None,
        path=choice.walk.path,
        reasons=(*choice.walk.reasons, *describe.reasons(search, method, scheme)),
        warnings=(
            *choice.warnings,
            *describe.warnings(search, target, scheme, expected),
            *(describe.ends_early(search, target, way.exporter) if not way.finished else ()),
            *describe.does_not_fit(search.merged, scheme, target, broken),
        ),
        missing=tuple(dict.fromkeys((*not_importable(method), *way.missing))),
        fits=not broken,
        estimates=expected,
    )


def _planned(search: Search, choice: _Choice) -> Iterator[_Ranked]:
    """Routes with a method that is not installed: they say what to install."""
    for place, entry in enumerate(search.registry.index.values()):
        if choice.family not in entry.families or not entry.is_offered:
            continue
        if entry.finishes and not entry.finishes_target(choice.target, search.profile.task):
            continue
        route = _planned_route(search, choice, entry)
        yield _Ranked(_key(search, choice, route, (True, entry.is_planned, True, place, 0)), route)


def _planned_route(search: Search, choice: _Choice, entry: IndexEntry) -> Route:
    target = choice.target
    scheme, expected, broken = _first_fitting(search, choice, entry.scheme_for(choice.family))
    absent_text = f"no installed plugin serves `{choice.family}`: {named([entry])} would"
    finishers = search.registry.finishers(target, search.profile.task)
    return Route(
        target=target.name,
        method=entry.name,
        family=choice.family,
        scheme=str(scheme),
        quantizer=entry.name,
        exporter=None,
        runtime=None,
        path=choice.walk.path,
        reasons=(*choice.walk.reasons, *describe.scheme_reasons(search, scheme)),
        warnings=(
            *choice.warnings,
            absent_text,
            *describe.warnings(search, target, scheme, expected),
            *describe.ends_early(search, target),
            *describe.does_not_fit(search.merged, scheme, target, broken),
        ),
        missing=tuple(dict.fromkeys((entry.distribution, *(finisher.distribution for finisher in finishers)))),
        fits=not broken,
        estimates=expected,
    )


def _first_fitting(search: Search, choice: _Choice, default: str) -> tuple[Scheme, Estimates, tuple[str, ...]]:
    """The first of the schemes that fits, else the last."""
    for level in _levels(search, choice, default):
        expected = _expect(search, choice, level[0], Speed(), uses_data=True)
        broken = unmet(expected, choice.target, search.goals)
        if not broken:
            break
    return level[0], expected, broken
