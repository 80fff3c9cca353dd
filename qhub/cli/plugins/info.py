"""`qhub plugins info`: what one plugin offers, installed or not."""

from __future__ import annotations

from typing import Any

import click

from qhub.cli import App
from qhub.cli.plugins.describe import describe, how_to_get, offers_text


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def info(app: App, name: str, *, as_json: bool) -> None:
    """Show what plugin NAME offers, installed or not."""
    facts = _facts(app, name)
    if as_json:
        app.output.json(facts)
        return
    said = {key: value for key, value in facts.items() if key not in ("components", "available") and (key, value) != ("status", "active")}
    rows = [(key, offers_text(value) if isinstance(value, dict) else str(value)) for key, value in said.items()]
    rows += [(component["name"], component["text"]) for component in facts.get("components", ())]
    app.output.table(("", name), rows)


def _facts(app: App, name: str) -> dict[str, Any]:
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
    return facts | (describe(installed[name], app.plugins) if name in installed else {"state": how_to_get(index[name])})
