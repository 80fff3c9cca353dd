"""Reads `registry.yaml`: devices as facts, and an index of known plugins; finds a target by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qhub.errors import QhubError, UsageError
from qhub.types import Fact, Family, Target

if TYPE_CHECKING:
    from qhub.plugins import Plugins

HOST = "host"
FILE = "registry.yaml"
_STATUSES = ("active", "maintenance", "archived")
_AVAILABLE = ("repository", "pypi", "planned")
_CONDITIONS = ("os", "arch", "accelerators", "without", "tasks")
_COUNTS = ("cores", "memory_bytes", "usable_memory_bytes", "flash_bytes")
_RATES = ("bandwidth_bytes_per_s", "int8_ops_per_s", "fp16_flops_per_s")
_TARGET_KEYS = {"summary", "os", "arch", "isa", "accelerators", "vendor", "notes", *_COUNTS, *_RATES}
_INDEX_KEYS = {"distribution", "kinds", "families", "schemes", "formats", "summary", "status", "available", "finishes"}


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A known plugin, installed or not: what it offers and which devices it finishes a route for."""

    name: str
    distribution: str
    kinds: tuple[str, ...]
    summary: str
    status: str = "active"
    available: str = "planned"
    families: tuple[Family, ...] = ()
    schemes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    finishes: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def finishes_target(self, target: Target, task: str) -> bool:
        """Whether people run models of this task on such a device with what this plugin writes or runs."""
        return any(_holds(condition, target, task) for condition in self.finishes)

    def scheme_for(self, family: Family) -> str:
        """The scheme it uses for `family`: `schemes` is in the order of `families`."""
        return self.schemes[min(self.families.index(family), len(self.schemes) - 1)]

    @property
    def is_planned(self) -> bool:
        """Whether it cannot be installed yet."""
        return self.available == "planned"


@dataclass(frozen=True, slots=True)
class Registry:
    """The contents of `registry.yaml`; `facts` has every number of a target with its source, `aliases` other words for one."""

    targets: Mapping[str, Target]
    index: Mapping[str, IndexEntry]
    facts: Mapping[str, Mapping[str, Fact]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def finishers(self, target: Target, task: str) -> tuple[IndexEntry, ...]:
        """The plugins that finish a route to `target`, best first; archived ones are never among them."""
        entries = [entry for entry in self.index.values() if entry.formats and entry.status != "archived"]
        return tuple(entry for entry in entries if entry.finishes_target(target, task))


def load_registry(path: Path | None = None) -> Registry:
    """Read the registry: `path`, else the copy in the package (a wheel), else the one beside it (an editable install).

    :raises QhubError: when there is none, or an entry is not what the format says.
    """
    import yaml

    path = path or _find()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        targets, plugins = data["targets"], data["plugins"]
        facts = {name: _facts(path, name, row) for name, row in targets.items()}
        return Registry(
            targets={name: _target(path, name, row, facts[name]) for name, row in targets.items()},
            index={name: _entry(path, name, row) for name, row in plugins.items()},
            facts=facts,
            aliases=_aliases(path, data.get("aliases", {}), targets),
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise QhubError(f"`{path}` is not a valid registry: {error}", hint="install qhub-core again") from None


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
    named = {key: str(row[key]) for key in ("summary", "os", "arch")}
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
    for condition in row.get("finishes", ()):
        _check_keys(path, name, condition, set(_CONDITIONS))
    return IndexEntry(
        name=name,
        distribution=str(row["distribution"]),
        kinds=tuple(row["kinds"]),
        summary=str(row["summary"]),
        status=str(row["status"]),
        available=str(row["available"]),
        families=tuple(row.get("families", ())),
        schemes=tuple(row.get("schemes", ())),
        formats=tuple(row.get("formats", ())),
        finishes=tuple({key: tuple(values) for key, values in condition.items()} for condition in row.get("finishes", ())),
    )


def _check_keys(path: Path, name: str, row: Mapping[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(set(row) - allowed):
        raise QhubError(f"`{path}`: `{name}` has the unknown key `{unknown[0]}`", hint=f"known: {', '.join(sorted(allowed))}")


def _holds(condition: Mapping[str, tuple[str, ...]], target: Target, task: str) -> bool:
    facts = {"os": target.os, "arch": target.arch, "tasks": task}
    if not all(fact in condition[key] for key, fact in facts.items() if key in condition):
        return False
    if "accelerators" in condition and not _has(target, condition["accelerators"]):
        return False
    return not _has(target, condition.get("without", ()))


def _has(target: Target, prefixes: tuple[str, ...]) -> bool:
    return any(accelerator.startswith(prefix) for accelerator in target.accelerators for prefix in prefixes)
