"""`qhub targets`: which devices are known, their facts with sources, what finishes a model there, and this machine measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from qhub.cli import App
from qhub.types import Task, as_json
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.route.registry import Registry
    from qhub.types import Fact, Target

#: field → (how a person calls it, its unit).
_RATES = {"bandwidth_bytes_per_s": ("bandwidth", "B/s"), "int8_ops_per_s": ("int8", "op/s"), "fp16_flops_per_s": ("fp16", "FLOP/s")}
_COUNTS = ("cores", "memory_bytes", "usable_memory_bytes", "flash_bytes")
_NONE = "–"


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def targets(ctx: click.Context, *, as_json: bool) -> None:
    """List the devices that models can be quantized for."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_targets, as_json=as_json)


@targets.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def list_targets(app: App, *, as_json: bool) -> None:
    """List the known devices and what finishes a language model (LLM) and an image model (CNN) there; host is this machine."""
    from qhub.route.host import detect
    from qhub.route.registry import known_targets, load_registry

    registry = load_registry()
    found = [detect(), *known_targets(app.plugins, registry).values()]
    if as_json:
        app.output.json({"targets": [_document(target, registry) for target in found]})
        return
    rows = [_row(target, registry) for target in found]
    rows += [(alias, *[""] * 5, f"another word for {name}") for alias, name in registry.aliases.items()]
    columns = ("target", "memory", "bandwidth", "int8", "LLM", "CNN", "what it is")
    app.output.table(columns, rows, right=("memory", "bandwidth", "int8"))


@targets.command()
@click.argument("name", metavar="T")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def show(app: App, name: str, *, as_json: bool) -> None:
    """Show every fact of device T and where it comes from."""
    from qhub.route.registry import find_target, load_registry

    registry = load_registry()
    _print(app, find_target(name, app.plugins, registry), registry, as_json=as_json)


@targets.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def detect(app: App, *, as_json: bool) -> None:
    """Detect this machine, measure its memory bandwidth for half a second, and remember it."""
    from qhub.route.host import cache_file, detect, measure_bandwidth
    from qhub.route.registry import load_registry

    measure_bandwidth()
    _print(app, detect(), load_registry(), as_json=as_json)
    app.output.text(f"kept in {cache_file()}")


def _document(target: Target, registry: Registry) -> dict[str, Any]:
    """A device as JSON: its fields, where each number comes from, its other names, and what finishes a model there by task."""
    facts = {key: as_json(fact) for key, fact in _facts(target, registry).items()}
    return {**as_json(target), "facts": facts, "aliases": registry.aliases_of(target.name), "finishers": _finishers(target, registry)}


def _finishers(target: Target, registry: Registry) -> dict[str, list[str]]:
    return {task: [entry.name for entry in registry.finishers(target, task)] for task in get_args(Task)}


def _facts(target: Target, registry: Registry) -> dict[str, Fact]:
    rates = {key: getattr(target, key) for key in _RATES}
    return {**registry.facts.get(target.name, {}), **{key: fact for key, fact in rates.items() if fact is not None}}


def _row(target: Target, registry: Registry) -> tuple[str, ...]:
    bandwidth, int8 = _rate(target.bandwidth_bytes_per_s, "B/s"), _rate(target.int8_ops_per_s, "op/s")
    first = [next((entry.name for entry in registry.finishers(target, task)), _NONE) for task in ("llm", "vision")]
    return (target.name, human_bytes(target.memory_bytes), bandwidth, int8, *first, target.summary)


def _print(app: App, target: Target, registry: Registry, *, as_json: bool) -> None:
    if as_json:
        app.output.json(_document(target, registry))
        return
    facts = _facts(target, registry)
    texts = {"what it is": target.summary, "also called": ", ".join(registry.aliases_of(target.name)), "os": target.os}
    texts |= {"arch": target.arch, "CPU by": target.vendor, "instructions": " ".join(target.isa)}
    texts |= {"accelerators": " ".join(target.accelerators)}
    rows: list[tuple[str, ...]] = [(label, text or _NONE, "") for label, text in texts.items()]
    rows += [(_label(key), _count(key, target), _source(facts.get(key))) for key in _COUNTS if key != "flash_bytes" or target.flash_bytes]
    rows += [(label, _rate(facts.get(key), unit), _source(facts.get(key))) for key, (label, unit) in _RATES.items()]
    rows += [(f"{task} by", ", ".join(names) or _NONE, "") for task, names in _finishers(target, registry).items()]
    rows += [(f"note: {note}",) for note in target.notes]
    app.output.table(("fact", target.name, "source"), rows)


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _count(key: str, target: Target) -> str:
    value = getattr(target, key)
    return str(value or _NONE) if key == "cores" else human_bytes(value)


def _rate(fact: Fact | None, unit: str) -> str:
    if fact is None:
        return _NONE
    prefix, factor = ("T", 1e12) if fact.value >= 1e12 else ("G", 1e9)
    return f"{fact.value / factor:.4g} {prefix}{unit}"


def _source(fact: Fact | None) -> str:
    return "" if fact is None else f"{fact.source} ({fact.date})" if fact.date else fact.source
