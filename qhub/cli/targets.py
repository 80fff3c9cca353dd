"""`qhub targets`: which devices are known, their facts with sources, and this machine measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from qhub.cli import App
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.types import Fact, Target

#: field → (how a person calls it, its unit).
_RATES = {"bandwidth_bytes_per_s": ("bandwidth", "B/s"), "int8_ops_per_s": ("int8", "op/s"), "fp16_flops_per_s": ("fp16", "FLOP/s")}


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
    """List the known devices; host is this machine."""
    from qhub.route.host import detect
    from qhub.route.registry import known_targets, load_registry

    found = [detect(), *known_targets(app.plugins, load_registry()).values()]
    if as_json:
        app.output.json({"targets": found})
        return
    rows = [(target.name, human_bytes(target.memory_bytes), _rate(target.bandwidth_bytes_per_s, "B/s"), target.summary) for target in found]
    app.output.table(("target", "memory", "bandwidth", "what it is"), rows, right=("memory", "bandwidth"))


@targets.command()
@click.argument("name", metavar="T")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def show(app: App, name: str, *, as_json: bool) -> None:
    """Show every fact of device T and where it comes from."""
    from qhub.route.registry import find_target, load_registry

    registry = load_registry()
    _print(app, find_target(name, app.plugins, registry), registry.facts.get(name, {}), as_json=as_json)


@targets.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def detect(app: App, *, as_json: bool) -> None:
    """Detect this machine, measure its memory bandwidth for half a second, and remember it."""
    from qhub.route.host import cache_file, detect, measure_bandwidth

    measure_bandwidth()
    _print(app, detect(), {}, as_json=as_json)
    app.output.text(f"kept in {cache_file()}")


def _print(app: App, target: Target, facts: Mapping[str, Fact], *, as_json: bool) -> None:
    if as_json:
        app.output.json(target)
        return
    rows = [("what it is", target.summary, ""), ("os", target.os, ""), ("arch", target.arch, "")]
    rows += [("instructions", " ".join(target.isa) or "–", ""), ("accelerators", " ".join(target.accelerators) or "–", "")]
    rows.append(("cores", str(target.cores or "–"), _source(facts.get("cores"))))
    for key in ("memory_bytes", "usable_memory_bytes"):
        rows.append((key.removesuffix("_bytes").replace("_", " "), human_bytes(getattr(target, key)), _source(facts.get(key))))
    for key, (label, unit) in _RATES.items():
        fact = getattr(target, key)
        rows.append((label, _rate(fact, unit), _source(fact)))
    rows += [("note", note, "") for note in target.notes]
    app.output.table(("fact", target.name, "source"), rows)


def _rate(fact: Fact | None, unit: str) -> str:
    if fact is None:
        return "–"
    prefix, factor = ("T", 1e12) if fact.value >= 1e12 else ("G", 1e9)
    return f"{fact.value / factor:.4g} {prefix}{unit}"


def _source(fact: Fact | None) -> str:
    return "" if fact is None else f"{fact.source} ({fact.date})" if fact.date else fact.source
