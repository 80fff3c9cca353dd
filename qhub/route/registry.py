"""Reads `registry.yaml`: devices as facts, and an index of known plugins; finds a target by name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qhub import __version__
from qhub.errors import QhubError, UsageError
from qhub.route.usercache import read_cache, write_cache
from qhub.types import Fact, Family, Target

if TYPE_CHECKING:
    from qhub.plugins import Plugins

HOST = "host"
FILE = "registry.yaml"
_CACHE = "registry.json"
_STATUSES = ("active", "maintenance", "archived")
_AVAILABLE = ("repository", "pypi", "planned", "none")
_CONDITIONS = ("os", "arch", "vendor", "isa", "accelerators", "without", "tasks")
_USUAL_PLACE = 2
_COUNTS = ("cores", "memory_bytes", "usable_memory_bytes", "flash_bytes")
_RATES = ("bandwidth_bytes_per_s", "int8_ops_per_s", "fp16_flops_per_s")
_TARGET_KEYS = {"summary", "os", "arch", "isa", "accelerators", "vendor", "notes", *_COUNTS, *_RATES}
_INDEX_TEXTS = ("distribution", "summary", "status", "available", "status_source", "replaced_by")
_INDEX_LISTS = ("kinds", "families", "schemes", "formats")
_INDEX_KEYS = {*_INDEX_TEXTS, *_INDEX_LISTS, "isolated", "finishes"}


@dataclass(frozen=True, slots=True)
class Condition:
    """Devices and tasks for which a plugin finishes a route; `place` is 1 for the first choice there, 3 for the last resort."""

    allowed: Mapping[str, tuple[str, ...]]
    place: int = _USUAL_PLACE

    def holds(self, target: Target, task: str) -> bool:
        """Whether `target` and `task` have one of the values that each key allows."""
        facts = {"os": target.os, "arch": target.arch, "vendor": target.vendor, "tasks": task}
        if not all(fact in self.allowed[key] for key, fact in facts.items() if key in self.allowed):
            return False
        if "isa" in self.allowed and not _any_starts(target.isa, self.allowed["isa"]):
            return False
        if "accelerators" in self.allowed and not _any_starts(target.accelerators, self.allowed["accelerators"]):
            return False
        return not _any_starts(target.accelerators, self.allowed.get("without", ()))


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A known plugin, installed or not: what it offers and which devices it finishes a route for.

    `replaced_by` names the entry to use in its place; `isolated` says that its dependencies exclude ours.
    """

    name: str
    distribution: str
    kinds: tuple[str, ...]
    summary: str
    status: str = "active"
    available: str = "planned"
    families: tuple[Family, ...] = ()
    schemes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    finishes: tuple[Condition, ...] = ()
    status_source: str = ""
    replaced_by: str = ""
    isolated: bool = False

    def place_on(self, target: Target, task: str) -> int | None:
        """How well this plugin finishes a route for models of this task to such a device: 1 best, 3 last; None if not at all."""
        if not self.is_offered:
            return None
        return min((condition.place for condition in self.finishes if condition.holds(target, task)), default=None)

    def finishes_target(self, target: Target, task: str) -> bool:
        """Whether people run models of this task on such a device with what this plugin writes or runs."""
        return self.place_on(target, task) is not None

    def scheme_for(self, family: Family) -> str:
        """The scheme it uses for `family`: `schemes` is in the order of `families`."""
        return self.schemes[min(self.families.index(family), len(self.schemes) - 1)]

    @property
    def is_planned(self) -> bool:
        """Whether it cannot be installed yet."""
        return self.available == "planned"

    @property
    def is_offered(self) -> bool:
        """Whether a route may use it: a plugin, also a planned one, that is not archived."""
        return self.status != "archived" and self.available != "none"

    @property
    def instead(self) -> str:
        """The end of a sentence that says why not: what to use in its place, if there is something."""
        return f": `{self.replaced_by}` takes its place" if self.replaced_by else ""

    @property
    def obstacle(self) -> str:
        """What stands between a plugin that is not installed and this machine."""
        if not self.is_offered:
            return ("archived" if self.status == "archived" else "not a plugin of qhub") + self.instead
        if self.is_planned:
            return "planned, not published yet"
        return f"not installed: `{f'qhub plugins install {self.name} --isolated' if self.isolated else f'pip install {self.distribution}'}`"


@dataclass(frozen=True, slots=True)
class Registry:
    """The contents of `registry.yaml`; `facts` has every number of a target with its source, `aliases` other words for one."""

    targets: Mapping[str, Target]
    index: Mapping[str, IndexEntry]
    facts: Mapping[str, Mapping[str, Fact]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def finishers(self, target: Target, task: str) -> tuple[IndexEntry, ...]:
        """The plugins that finish a route to `target`, best first; archived ones are never among them."""
        found = [(entry.place_on(target, task), entry) for entry in self.index.values() if entry.formats]
        placed = sorted(((place, entry) for place, entry in found if place is not None), key=lambda pair: pair[0])
        return tuple(entry for _, entry in placed)

    def aliases_of(self, name: str) -> tuple[str, ...]:
        """Other words for the device `name`."""
        return tuple(alias for alias, meant in self.aliases.items() if meant == name)


def load_registry(path: Path | None = None) -> Registry:
    """Read the registry: `path`, else the copy in the package (a wheel), else the one beside it (an editable install).

    What was parsed is kept in the user's cache folder, since reading YAML takes longer than everything else here.

    :raises QhubError: when there is none, or an entry is not what the format says.
    """
    if path is not None:
        return _built(path, _parsed(path))
    path = _find()
    state = path.stat()
    made_from = [__version__, str(path), state.st_size, state.st_mtime_ns]
    cache = read_cache(_CACHE)
    if cache.get("made_from") == made_from:
        with contextlib.suppress(QhubError):  # a spoilt cache: the file itself decides
            return _built(path, cache.get("data"))
    data = _parsed(path)
    registry = _built(path, data)
    write_cache(_CACHE, {"made_from": made_from, "data": data})
    return registry


def _built(path: Path, data: Any) -> Registry:  # noqa: ANN401 - what YAML or JSON holds
    try:
        targets, plugins = data["targets"], data["plugins"]
        facts = {name: _facts(path, name, row) for name, row in targets.items()}
        return Registry(
            targets={name: _target(path, name, row, facts[name]) for name, row in targets.items()},
            index={name: _entry(path, name, row) for name, row in plugins.items()},
            facts=facts,
            aliases=_aliases(path, data.get("aliases", {}), targets),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _invalid(path, error) from None


def _parsed(path: Path) -> Any:  # noqa: ANN401 - what YAML holds
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        raise _invalid(path, error) from None


def _invalid(path: Path, error: Exception) -> QhubError:
    return QhubError(f"`{path}` is not a valid registry: {error}", hint="install qhub-core again")


def find_target(name: str, plugins: Plugins, registry: Registry | None = None) -> Target:
    """The device called `name`: `host` is this machine, then `registry.yaml`, what plugins add, and last the aliases.

    :raises UsageError: when nobody knows it.
    """
    if name == HOST:
        from qhub.route.host import detect

        return detect()
    registry = registry or load_registry()
    known = known_targets(plugins, registry)
    if name not in known:
        if name in registry.aliases:
            return registry.targets[registry.aliases[name]]
        near = difflib.get_close_matches(name, [HOST, *known, *registry.aliases], n=1)
        hint = f"did you mean `{near[0]}`? `qhub targets` lists them all" if near else "`qhub targets` lists the known ones"
        raise UsageError(f"unknown target `{name}`", hint=hint)
    return known[name]


def known_targets(plugins: Plugins, registry: Registry) -> dict[str, Target]:
    """Every named device: those of the registry, then those of plugins."""
    return {**registry.targets, **plugins.targets}


def _find() -> Path:
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / FILE, package.parent / FILE):
        if candidate.is_file():
            return candidate
    raise QhubError(f"`{FILE}` is missing from `{package}`", hint="install qhub-core again")


def _facts(path: Path, name: str, row: Mapping[str, Any]) -> dict[str, Fact]:
    _check_keys(path, name, row, _TARGET_KEYS)
    numbers = {key: row[key] for key in (*_COUNTS, *_RATES) if key in row}
    return {key: Fact(float(entry["value"]), str(entry["source"]), str(entry["date"])) for key, entry in numbers.items()}


def _target(path: Path, name: str, row: Mapping[str, Any], facts: Mapping[str, Fact]) -> Target:
    counts = {key: int(facts[key].value) for key in _COUNTS if key in facts}
    rates = {key: facts[key] for key in _RATES if key in facts}
    texts = {key: tuple(str(item) for item in row.get(key, ())) for key in ("isa", "accelerators", "notes")}
    numbers = cast("dict[str, Any]", {**counts, **rates, **texts})
    named = cast("dict[str, Any]", {key: str(row[key]) for key in ("summary", "os", "arch")})
    return Target(name=name, vendor=str(row.get("vendor", "")), **named, **numbers)


def _aliases(path: Path, rows: Mapping[str, str], targets: Mapping[str, Any]) -> dict[str, str]:
    for name, meant in rows.items():
        if name in targets or meant not in targets:
            raise QhubError(f"`{path}`: alias `{name}` of `{meant}`: the first must not be a target, the second must be one")
    return dict(rows)


def _entry(path: Path, name: str, row: Mapping[str, Any]) -> IndexEntry:
    _check_keys(path, name, row, _INDEX_KEYS)
    if row["status"] not in _STATUSES or row["available"] not in _AVAILABLE:
        raise QhubError(f"`{path}`: plugin `{name}` has status `{row['status']}` and available `{row['available']}`")
    texts = cast("dict[str, Any]", {key: str(row[key]) for key in _INDEX_TEXTS if key in row})
    lists = cast("dict[str, Any]", {key: tuple(row.get(key, ())) for key in _INDEX_LISTS})
    finishes = tuple(_condition(path, name, condition) for condition in row.get("finishes", ()))
    return IndexEntry(name=name, **texts, **lists, isolated=bool(row.get("isolated", False)), finishes=finishes)


def _condition(path: Path, name: str, row: Mapping[str, Any]) -> Condition:
    _check_keys(path, name, row, {*_CONDITIONS, "place"})
    allowed = {key: tuple(row[key]) for key in _CONDITIONS if key in row}
    return Condition(allowed, int(row.get("place", _USUAL_PLACE)))


def _check_keys(path: Path, name: str, row: Mapping[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(set(row) - allowed):
        raise QhubError(f"`{path}`: `{name}` has the unknown key `{unknown[0]}`", hint=f"known: {', '.join(sorted(allowed))}")


def _any_starts(names: tuple[str, ...], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)
