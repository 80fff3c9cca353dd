"""`qhub plugins new`: writes a complete plugin that passes its own tests."""

from __future__ import annotations

from pathlib import Path

import click

from qhub.cli import App
from qhub.scaffold.write import KINDS, LICENSES, NewPlugin, check_name, write_plugin


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What the plugin offers.")
@click.option(
    "--license",
    type=click.Choice(LICENSES, case_sensitive=False),
    default="Apache-2.0",
    help="Its license; default Apache-2.0.",
)
@click.option("--author", default="", help="Whose it is; default: its authors.")
@click.option("--scheme", default="w4a16-g128-asym", metavar="S", help="What a quantizer writes by default; default w4a16-g128-asym.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def new(app: App, /, name: str, *, as_json: bool, **choices: str) -> None:
    """Write a new plugin NAME into the folder ./qhub-NAME."""
    from qhub.route.registry import load_registry

    taken = {known: f"plugin `{entry.distribution}`" for known, entry in load_registry().index.items()}
    check_name(name, {**taken, "core": "qhub itself"})
    wanted = NewPlugin(name, **choices)
    files = write_plugin(wanted, Path())
    if as_json:
        app.output.json({"name": name, "distribution": wanted.distribution, "folder": wanted.distribution, "files": files})
        return
    for file in files:
        app.output.print(str(file))
    folder = wanted.distribution
    app.output.text(f"the code is in {folder}/{wanted.fields['module']}; `qhub plugins check ./{folder}` checks it")
