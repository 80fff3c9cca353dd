"""`qhub plugins list`: the installed plugins, what they offer, and whether they work here."""

from __future__ import annotations

import click

from qhub.cli import App
from qhub.cli.plugins.describe import describe, offers_text


@click.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def list_plugins(app: App, *, as_json: bool) -> None:
    """List the installed plugins: what they offer, whether they work."""
    rows = [describe(info, app.plugins) for info in app.plugins.infos]
    if as_json:
        app.output.json({"plugins": rows})
        return
    columns = ("plugin", "distribution", "version", "offers", "here")
    table = [(row["name"], row["distribution"], row["version"], offers_text(row["offers"]), row["state"]) for row in rows]
    app.output.table(columns, table)
    if not rows:
        app.output.text("no plugins are installed; `pip install qhub-awq` brings one")
