"""Which way: profile × targets × goals × what is installed → ranked routes, each with its reasons, and what was rejected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qhub.errors import NoRouteError
from qhub.plugins import Plugins
from qhub.route.estimate import Speed, estimate, is_quantized, largest_fitting_parameters, unmet
from qhub.route.flowchart import walk
from qhub.route.registry import IndexEntry, Registry, load_registry
from qhub.route.ways import Method, Search, Way, ask, methods, not_importable, read_wanted, speed_of, ways
from qhub.types import Family, Goals, ModelProfile, Recommendation, Rejected, Route, Scheme, Step, Target

#: Up to this size a model loses much to large groups (OPT-1.3B: perplexity 31.9 per channel, 15.3 with groups of 32).
SMALL_MODEL_PARAMETERS = 2e9
SMALL_MODEL_GROUP = 32
GROUP_SIZES = (128, 64, 32, 16)
#: Below this drop 4 bits are a gamble, and 8 come first.
TIGHT_DROP_PCT = 0.5
#: What is tried when the first choice does not fit.
FEWER_BITS = 3


@dataclass(frozen=True, slots=True)
class _Walked:
    """The chart's answer for one target."""

    target: Target
    family: Family | None
    path: tuple[Step, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


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
    rejected: list[Rejected] = []
    for target in targets:
        found = sorted(_routes(search, target, rejected), key=lambda ranked: ranked.key)
        routes += [ranked.route for ranked in found]
    if not routes:
        raise _no_route(search, targets, rejected)
    return Recommendation(profile, goals, tuple(routes), tuple(rejected))


def _no_route(search: Search, targets: Sequence[Target], rejected: Sequence[Rejected]) -> NoRouteError:
    names = ", ".join(f"`{target.name}`" for target in targets)
    why = f": {rejected[0].route}: {rejected[0].reason}" if rejected else ""
    if len(targets) == 1:
        why = why.replace(f": {targets[0].name}: ", ": ", 1)
    more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
    hint = f"`qhub recommend {search.profile.path} --explain` shows every rejected route; `qhub plugins` what is installed"
    return NoRouteError(f"no route from `{search.profile.source}` to {names}{why}{more}", hint=hint)


def _routes(search: Search, target: Target, rejected: list[Rejected]) -> Iterator[_Ranked]:
    walked = _Walked(target, *walk(search.profile, search.goals, target))
    if walked.family is None:
        rejected.append(Rejected(f"{target.name}: {walked.path[-1].answer}", walked.reasons[-2]))
        return
    found = methods(search.plugins, walked.family, search.wanted)
    if not found:
        yield from _planned(search, walked)
        if search.goals.retrain:
            yield from _without_retraining(search, walked, rejected)
        return
    family = found[0].quantizers[-1].family
    if family != walked.family:
        warning = f"the chart leads to `{walked.family}`; `{found[0].name}` was asked for"
        walked = replace(walked, family=family, warnings=(warning,))
    open_ways, closed = ways(search, target)
    rejected += closed
    for place, method in enumerate(found):
        for way in open_ways:
            yield from _candidate(search, walked, (method, place), way, rejected)


def _without_retraining(search: Search, walked: _Walked, rejected: list[Rejected]) -> Iterator[_Ranked]:
    """Where retraining is possible but nothing installed does it, the other branch is still a way to go."""
    warning = f"no installed plugin serves `{walked.family}`: this is the branch without retraining"
    without = replace(search, goals=replace(search.goals, retrain=False))
    for ranked in _routes(without, walked.target, rejected):
        yield replace(ranked, route=replace(ranked.route, warnings=(warning, *ranked.route.warnings)))


def _candidate(search: Search, walked: _Walked, ranked: tuple[Method, int], way: Way, rejected: list[Rejected]) -> Iterator[_Ranked]:
    """The best scheme that method and exporter take and that fits; the smallest if none fits."""
    method, place = ranked
    name = f"{walked.target.name}: {method.name} → {way.name}"
    last: tuple[int, Scheme] | None = None
    for step, level in enumerate(_levels(search, method)):
        scheme, why = _accepted(search, method, way, level)
        if scheme is None:
            rejected.append(Rejected(name, why))
            continue
        broken = unmet(estimate(search.profile, scheme, walked.target, speed_of(way, walked.target)), walked.target, search.goals)
        if last is not None:
            rejected.append(Rejected(f"{name} ({last[1]})", "a smaller scheme fits" if not broken else "does not fit"))
        last = (step, scheme)
        if not broken:
            break
    if last is not None:
        route = _route(search, walked, method, way, last[1])
        key = (not route.fits, bool(not_importable(method)), not way.finished, place, last[0])
        yield _Ranked(tuple(map(int, key)), route)


def _accepted(search: Search, method: Method, way: Way, level: Sequence[Scheme]) -> tuple[Scheme | None, str]:
    """The first scheme of `level` that nobody refuses, or the first reason."""
    first_reason = ""
    for scheme in level:
        why = method.reject(search.profile, scheme)
        if why is None and way.exporter is not None:
            why = ask(way.exporter.reject, search.profile, scheme)
        if why is None:
            return scheme, ""
        first_reason = first_reason or why
    return None, first_reason


def _levels(search: Search, method: Method) -> Iterator[Sequence[Scheme]]:
    """Schemes to try: each level is one number of bits with the group sizes that suit the model, best first."""
    if search.scheme is not None:
        yield (search.scheme,)
        return
    default = Scheme.parse(method.quantizers[0].default_scheme)
    if not default.is_weight_only:
        yield (default,)
        return
    if search.goals.max_drop_pct < TIGHT_DROP_PCT and default.weight_bits < 8:
        yield (Scheme(8),)
    yield _grouped(search.profile, default)
    if default.weight_bits > FEWER_BITS:
        yield _grouped(search.profile, replace(default, weight_bits=FEWER_BITS))


def _grouped(profile: ModelProfile, default: Scheme) -> tuple[Scheme, ...]:
    if default.group_size is None:
        return (default,)
    start = min(default.group_size, SMALL_MODEL_GROUP) if profile.parameters <= SMALL_MODEL_PARAMETERS else default.group_size
    schemes = [replace(default, group_size=size) for size in GROUP_SIZES if size <= start]
    schemes.sort(key=lambda scheme: -_divided_share(profile, scheme))  # stable: of equals, the largest group stays first
    symmetric = [] if default.symmetric else [replace(scheme, symmetric=True) for scheme in schemes]
    return (*schemes, *symmetric, Scheme(default.weight_bits))


def _suited(profile: ModelProfile, default: Scheme) -> Scheme:
    return _grouped(profile, default)[0] if default.is_weight_only else default


def _divided_share(profile: ModelProfile, scheme: Scheme) -> float:
    """Share of the parameters in blocks whose K the group size divides."""
    linears = profile.linears()
    total = sum(layer.shape[0] * layer.shape[-1] for layer in linears)
    return sum(layer.shape[0] * layer.shape[-1] for layer in linears if is_quantized(layer, scheme)) / max(total, 1)


def _route(search: Search, walked: _Walked, method: Method, way: Way, scheme: Scheme) -> Route:
    profile, target = search.profile, walked.target
    expected = estimate(profile, scheme, target, speed_of(way, target))
    broken = unmet(expected, target, search.goals)
    needs = (*not_importable(method), *way.missing)
    return Route(
        target=target.name,
        method=method.name,
        family=method.quantizers[-1].family,
        scheme=str(scheme),
        quantizer=method.quantizers[-1].name,
        exporter=way.exporter.name if way.exporter else None,
        runtime=way.runtime.name if way.runtime else None,
        path=walked.path,
        reasons=(*walked.reasons, *_reasons(search, method, scheme)),
        warnings=(
            *walked.warnings,
            *_left_float(profile, scheme),
            *(_ends_early(search, target) if not way.finished else ()),
            *_does_not_fit(profile, scheme, target, broken),
        ),
        missing=tuple(dict.fromkeys(needs)),
        fits=not broken,
        estimates=expected,
    )


def _reasons(search: Search, method: Method, scheme: Scheme) -> Iterator[str]:
    if search.wanted.quantizers:
        yield f"`{method.name}` was asked for"
    elif method.uses_data:
        yield f"`{method.name}` uses calibration text, which keeps more accuracy than rounding alone"
    else:
        yield f"`{method.name}` needs no data"
    if search.scheme is not None:
        yield f"scheme `{scheme}` was asked for"
    elif scheme.weight_bits == 8 and search.goals.max_drop_pct < TIGHT_DROP_PCT:
        yield f"a drop of at most {search.goals.max_drop_pct:g} % is tight: 8 bits come first"
    elif scheme.group_size is not None and scheme.group_size <= SMALL_MODEL_GROUP and search.profile.parameters <= SMALL_MODEL_PARAMETERS:
        yield f"groups of {scheme.group_size}: models up to 2 B parameters lose much to larger groups"


def _left_float(profile: ModelProfile, scheme: Scheme) -> Iterator[str]:
    if not scheme.is_weight_only:
        return
    left = [layer for layer in profile.linears() if not is_quantized(layer, scheme)]
    if left:
        widths = ", ".join(str(width) for width in sorted({layer.shape[-1] for layer in left}))
        yield f"groups of {scheme.group_size} do not divide K = {widths} of {len(left)} layers such as `{left[0].name}`: they stay float"


def _ends_early(search: Search, target: Target) -> Iterator[str]:
    finishers = search.registry.finishers(target, search.profile.task)
    who = named(finishers) if finishers else "no known plugin"
    yield f"nothing installed runs this on `{target.name}`: the run ends with the QuantizedModel; {who} would finish it"


def named(entries: Sequence[IndexEntry]) -> str:
    """The distributions that can be installed, and those that cannot yet."""
    there = " or ".join(f"`{entry.distribution}`" for entry in entries if not entry.is_planned)
    planned = " or ".join(f"`{entry.distribution}`" for entry in entries if entry.is_planned)
    return " or ".join([*([there] if there else []), *([f"{planned} (planned, not published yet)"] if planned else [])])


def _does_not_fit(profile: ModelProfile, scheme: Scheme, target: Target, broken: Iterable[str]) -> Iterator[str]:
    for text in broken:
        yield f"does not fit: {text}"
        largest = largest_fitting_parameters(profile, scheme, target)
        if "the memory of" in text and largest is not None:
            yield f"at `{scheme}` a model of up to about {largest / 1e9:.2g} B parameters fits `{target.name}`"


def _planned(search: Search, walked: _Walked) -> Iterator[_Ranked]:
    """Routes with a method that is not installed: they say what to install."""
    for place, entry in enumerate(search.registry.index.values()):
        if walked.family not in entry.families or entry.status == "archived":
            continue
        if entry.finishes and not entry.finishes_target(walked.target, search.profile.task):
            continue
        route = _planned_route(search, walked, entry, walked.family)
        yield _Ranked((int(not route.fits), 1, int(entry.is_planned), place, 0), route)


def _planned_route(search: Search, walked: _Walked, entry: IndexEntry, family: Family) -> Route:
    target = walked.target
    scheme = search.scheme or _suited(search.profile, Scheme.parse(entry.scheme_for(family)))
    expected = estimate(search.profile, scheme, target, Speed())
    broken = unmet(expected, target, search.goals)
    absent = f"no installed plugin serves `{family}`: {named([entry])} would"
    finishers = search.registry.finishers(target, search.profile.task)
    return Route(
        target=target.name,
        method=entry.name,
        family=family,
        scheme=str(scheme),
        quantizer=entry.name,
        exporter=None,
        runtime=None,
        path=walked.path,
        reasons=walked.reasons,
        warnings=(absent, *_ends_early(search, target), *_does_not_fit(search.profile, scheme, target, broken)),
        missing=(entry.distribution, *(finisher.distribution for finisher in finishers)),
        fits=not broken,
        estimates=expected,
    )
