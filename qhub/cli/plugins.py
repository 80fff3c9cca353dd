"""`qhub plugins`: which methods, formats and engines are installed, and what keeps one from working here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App

if TYPE_CHECKING:
    from qhub.interfaces import Component
    from qhub.plugins import PluginInfo, Plugins

_KINDS = ("quantizers", "exporters", "runtimes", "models")


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def plugins(ctx: click.Context, *, as_json: bool) -> None:
    """List the installed plugins."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins, as_json=as_json)


@plugins.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def list_plugins(app: App, *, as_json: bool) -> None:
    """List the installed plugins: what they offer, whether they work."""
    rows = [describe(info, app.plugins) for info in app.plugins.infos]
    if as_json:
        app.output.json({"plugins": rows})
        return
    columns = ("plugin", "distribution", "version", "offers", "here")
    table = [(row["name"], row["distribution"], row["version"], _offers(row["offers"]), row["state"]) for row in rows]
    app.output.table(columns, table)
    if not rows:
        app.output.text("no plugins are installed; `pip install qhub-awq` brings one")


@plugins.command()
@click.argument("name", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def info(app: App, name: str, *, as_json: bool) -> None:
    """Show what plugin NAME offers, installed or not."""
    from qhub.errors import UsageError
    from qhub.plugins import suggest
    from qhub.route.registry import load_registry

    index = load_registry().index
    installed = {plugin.name: plugin for plugin in app.plugins.infos}
    if name not in installed and name not in index:
        raise UsageError(f"unknown plugin `{name}`", hint=suggest(name, {*installed, *index}))
    facts: dict[str, Any] = {"name": name}
    if name in index:
        entry = index[name]
        facts |= {"summary": entry.summary, "status": entry.status, "available": entry.available, "distribution": entry.distribution}
    facts |= describe(installed[name], app.plugins) if name in installed else {"state": _how_to_get(index[name].distribution, name, app)}
    if as_json:
        app.output.json(facts)
        return
    said = {key: value for key, value in facts.items() if key not in ("components", "available") and (key, value) != ("status", "active")}
    rows = [(key, _offers(value) if isinstance(value, dict) else str(value)) for key, value in said.items()]
    rows += [(component["name"], component["text"]) for component in facts.get("components", ())]
    app.output.table(("", name), rows)


def _how_to_get(distribution: str, name: str, app: App) -> str:
    from qhub.route.registry import load_registry

    planned = load_registry().index[name].is_planned
    return "planned, not published yet" if planned else f"not installed: pip install {distribution}"


def describe(info: PluginInfo, installed: Plugins) -> dict[str, Any]:
    """One installed plugin: who it is, what it offers, and whether it works here (`state`)."""
    row: dict[str, Any] = {"name": info.name, "distribution": info.distribution, "version": info.version, "offers": {}, "components": []}
    if info.error is not None:
        return {**row, "state": f"broken: {info.error}"}
    try:
        row["offers"] = installed.components_of(info.name)
    except Exception as error:  # noqa: BLE001 - a plugin's own code
        return {**row, "state": f"broken: {type(error).__name__}: {error}"}
    found = [_component(kind, name, installed) for kind, names in row["offers"].items() for name in names]
    row["components"] = [{"name": f"{kind[:-1]} {part.name}", "text": _text(part)} for kind, part in found if part is not None]
    return {**row, "state": _state(info, [part for _, part in found if part is not None])}


def _component(kind: str, name: str, installed: Plugins) -> tuple[str, Any]:
    return kind, getattr(installed, kind).get(name)


def _text(part: Any) -> str:  # noqa: ANN401 - a component or a model source
    facts = [part.summary]
    if family := getattr(part, "family", None):
        facts.append(f"serves {family}, {part.default_scheme} by default")
    if options := getattr(part, "options", None):
        facts.append("options " + ", ".join(f"{key}={value}" for key, value in options.items()))
    return "; ".join(facts)


def _state(info: PluginInfo, parts: list[Component]) -> str:
    from qhub.plugins import missing_modules

    missing = {module for part in parts if hasattr(part, "requires") for module in missing_modules(part)}
    if not missing:
        return "usable"
    install = next((part.distribution for part in parts if getattr(part, "distribution", "")), info.distribution)
    return f"not usable here, {', '.join(sorted(missing))} missing: pip install {install}"


def _offers(offers: dict[str, list[str]]) -> str:
    return ", ".join(f"{kind[:-1] if len(names) == 1 else kind} {' '.join(names)}" for kind, names in offers.items() if names) or "–"
