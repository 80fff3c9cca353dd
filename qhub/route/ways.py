"""Who may take part in a route: the methods for a family, and the ways from a quantized model onto a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qhub.errors import PluginError, UsageError
from qhub.interfaces import Component, Exporter, Quantizer, Runtime
from qhub.plugins import Plugins, missing_modules, suggest
from qhub.route.estimate import merged
from qhub.route.registry import HOST, Registry
from qhub.route.speed import Speed
from qhub.types import Family, Goals, ModelProfile, Rejected, Scheme, Target


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `--plugin` names constrain a route to; empty means free."""

    quantizers: tuple[str, ...] = ()
    exporters: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """What routes are looked for: for which model, under which goals, among whom."""

    profile: ModelProfile
    goals: Goals
    plugins: Plugins
    registry: Registry
    wanted: Wanted = field(default_factory=Wanted)
    scheme: Scheme | None = None  # forced by the user

    @cached_property
    def merged(self) -> ModelProfile:
        """The profile that arithmetic is done on; `profile` has every layer by its name."""
        return merged(self.profile)


@dataclass(frozen=True, slots=True)
class Method:
    """One quantizer, or several that work together: all but the last bring scales, the last one rounds."""

    quantizers: tuple[Quantizer, ...]

    @property
    def name(self) -> str:
        """The names joined with "+", e.g. `awq+gptq`."""
        return "+".join(quantizer.name for quantizer in self.quantizers)

    @property
    def uses_data(self) -> bool:
        """Whether calibration data improves it."""
        return any(quantizer.needs or quantizer.scales for quantizer in self.quantizers)

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Why one of the quantizers refuses."""
        return next((why for one in self.quantizers if (why := ask(one.reject, profile, scheme)) is not None), None)


@dataclass(frozen=True, slots=True)
class Way:
    """From a quantized model onto a device. `finished` is False where nothing installed runs it there."""

    exporter: Exporter | None = None
    runtime: Runtime | None = None
    finished: bool = False
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How a rejected route is called."""
        return " → ".join(part.name for part in (self.exporter, self.runtime) if part is not None) or "no exporter"


def ask(function: Callable[..., str | None], *arguments: Any) -> str | None:  # noqa: ANN401 - a plugin's method
    """The reason a plugin gives for refusing; a plugin that fails while it is asked has refused."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - a plugin's own code
        return f"its plugin failed: {type(error).__name__}: {error}"


def read_wanted(names: Sequence[str], plugins: Plugins, registry: Registry) -> Wanted:
    """What the plugins or components called `names` offer.

    :raises UsageError: when a name is unknown. :raises PluginError: when the plugin is installed but broken.
    """
    found: dict[str, list[str]] = {"quantizers": [], "exporters": [], "runtimes": []}
    for name in names:
        for kind, offered in _offers(name, plugins, registry).items():
            if kind in found:
                found[kind] += [component for component in offered if component not in found[kind]]
    return Wanted(**{kind: tuple(offered) for kind, offered in found.items()})


def _offers(name: str, plugins: Plugins, registry: Registry) -> Mapping[str, Sequence[str]]:
    info = next((info for info in plugins.infos if info.name == name), None)
    if info is not None and info.error is not None:
        message = f"plugin `{name}` of `{info.distribution}` cannot be used: {info.error}"
        raise PluginError(message, hint=f"`pip install --force-reinstall {info.distribution}`")
    if info is not None:
        return plugins.components_of(name)
    kinds: dict[str, Mapping[str, Component]] = {
        "quantizers": plugins.quantizers,
        "exporters": plugins.exporters,
        "runtimes": plugins.runtimes,
    }
    offers = {kind: [name] for kind, components in kinds.items() if name in components}
    if not offers:
        raise _unknown_plugin(name, plugins, registry, kinds.values())
    return offers


def _unknown_plugin(name: str, plugins: Plugins, registry: Registry, kinds: Iterable[Mapping[str, Component]]) -> UsageError:
    entry = registry.index.get(name)
    if entry is not None and entry.is_planned:
        return UsageError(f"plugin `{name}` is planned and not published yet", hint="`qhub plugins` lists the installed ones")
    if entry is not None and not entry.is_offered:
        hint = f"`--plugin {entry.replaced_by}`" if entry.replaced_by else "`qhub plugins` lists the installed ones"
        return UsageError(f"`{name}` is {entry.obstacle}", hint=hint)
    if entry is not None:
        return UsageError(f"plugin `{name}` is not installed", hint=entry.obstacle.removeprefix("not installed: "))
    known = {info.name for info in plugins.infos} | {component for components in kinds for component in components}
    return UsageError(f"unknown plugin `{name}`", hint=suggest(name, known))


def methods(plugins: Plugins, family: Family | None, wanted: Wanted) -> list[Method]:
    """The wanted method, else every installed one of `family`, best expected accuracy first.

    Methods that use calibration data come before those that do not, and those that bring scales first: they need the
    fewest samples and lose the least on text unlike the calibration text.

    :raises UsageError: when the wanted quantizers do not work together.
    """
    if wanted.quantizers:
        return [_combined([plugins.quantizers[name] for name in wanted.quantizers])]
    found = [Method((quantizer,)) for quantizer in plugins.quantizers.values() if family is not None and quantizer.serves(family)]
    return sorted(found, key=lambda method: (not method.uses_data, not method.quantizers[-1].scales, method.name))


def _combined(quantizers: Sequence[Quantizer]) -> Method:
    rounding = [quantizer for quantizer in quantizers if not quantizer.scales]
    scaling = [quantizer for quantizer in quantizers if quantizer.scales]
    if len(rounding) > 1:
        names = "`, `".join(quantizer.name for quantizer in rounding)
        raise UsageError(f"quantizers `{names}` do not work together: each of them rounds", hint=f"keep one: `--plugin {rounding[0].name}`")
    if len(quantizers) > 2:
        names = "`, `".join(quantizer.name for quantizer in quantizers)
        raise UsageError(
            f"cannot combine `{names}`", hint="combine one that scales with one that rounds, e.g. `--plugin awq --plugin gptq`"
        )
    return Method((*scaling, *rounding))


def ways(search: Search, target: Target) -> tuple[list[Way], list[Rejected]]:
    """Every way onto `target` with what is installed; where nothing finishes it, the one way that ends early."""
    found: list[Way] = []
    rejected: list[Rejected] = []
    for exporter in search.plugins.exporters.values():
        if not search.wanted.exporters or exporter.name in search.wanted.exporters:
            found += _ways_of(exporter, search, target, rejected)
    finishers = search.registry.finishers(target, search.profile.task)
    finished = [way for way in found if way.finished]
    if finished or search.wanted.runtimes:
        best = [entry.name for entry in finishers]
        return sorted(_without_variants(finished), key=lambda way: _place(way.runtime, best)), rejected
    order = list(search.registry.index)
    found.sort(key=lambda way: order.index(way.name) if way.name in order else len(order))
    exporter_only = found[0].exporter if found else None
    missing = [] if search.wanted.exporters else [entry.distribution for entry in finishers]
    needs = _not_importable(exporter_only) if exporter_only else ()
    return [Way(exporter_only, missing=(*needs, *(name for name in missing if name not in needs)))], rejected


def _place(runtime: Runtime | None, best: Sequence[str]) -> int:
    """The place of an engine among what people use on the device; one that the registry does not know comes last."""
    return best.index(runtime.name) if runtime is not None and runtime.name in best else len(best)


def _without_variants(found: Sequence[Way]) -> list[Way]:
    """Without an engine's further formats where the exporter of the engine's own name is there: those are for who names them."""
    pairs = [(way, way.exporter and way.exporter.name, way.runtime and way.runtime.name) for way in found]
    own = {runtime for _, exporter, runtime in pairs if exporter == runtime}
    return [way for way, exporter, runtime in pairs if exporter == runtime or runtime not in own]


def _ways_of(exporter: Exporter, search: Search, target: Target, rejected: list[Rejected]) -> list[Way]:
    found = []
    for runtime in search.plugins.runtimes.values():
        if exporter.format not in runtime.formats or (search.wanted.runtimes and runtime.name not in search.wanted.runtimes):
            continue
        why = ask(runtime.reject, target)
        if why is not None:
            rejected.append(Rejected(f"{target.name}: {exporter.name} → {runtime.name}", why))
        elif _finishes(runtime, search, target):
            needs = _not_importable(exporter) + (_not_importable(runtime) if target.name == HOST else ())
            found.append(Way(exporter, runtime, finished=True, missing=tuple(dict.fromkeys(needs))))
    return found or [Way(exporter)]


def _finishes(runtime: Runtime, search: Search, target: Target) -> bool:
    """Whether people use `runtime` on `target`: it was asked for, the registry says so, or the registry does not know it."""
    if runtime.name in (*search.wanted.runtimes, *search.wanted.exporters):
        return True
    entry = search.registry.index.get(runtime.name)
    return entry is None or entry.finishes_target(target, search.profile.task)


def speed_of(way: Way, target: Target) -> Speed:
    """The share of the roofline that the runtime measured on `target`, if it did."""
    if way.runtime is None:
        return Speed()
    try:
        return Speed(way.runtime.efficiency(target), f"measured by `{way.runtime.name}`")
    except Exception:  # noqa: BLE001 - a plugin's own code; without its figure the assumption stands
        return Speed()


def not_importable(method: Method) -> tuple[str, ...]:
    """The distributions to install before `method` can work here."""
    return tuple(name for quantizer in method.quantizers for name in _not_importable(quantizer))


def _not_importable(component: Component) -> tuple[str, ...]:
    return (component.distribution or f"qhub-{component.name}",) if missing_modules(component) else ()
