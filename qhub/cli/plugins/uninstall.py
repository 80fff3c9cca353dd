"""`qhub plugins uninstall`: removes a plugin, or the environment of its own that it has."""

from __future__ import annotations

from importlib import metadata

import click

from qhub.cli import App


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def uninstall(app: App, name: str, *, as_json: bool) -> None:
    """Remove plugin NAME; nothing of it is imported for that."""
    from qhub.isolation.environments import environment

    removed = _apart(name) if environment(name).folder.exists() else _here(name)
    if as_json:
        app.output.json({"removed": name, "from": removed})
        return
    app.output.print(f"removed `{name}`: {removed}")


def _apart(name: str) -> str:
    from qhub.isolation.install import remove

    return str(remove(name).folder)


def _here(name: str) -> str:
    from qhub.cli.plugins import pip
    from qhub.errors import UsageError
    from qhub.plugins import GROUP, suggest

    brought = {point.name: point.dist.name for point in metadata.entry_points(group=GROUP) if point.dist is not None}
    if name not in brought:
        raise UsageError(f"no plugin `{name}` is installed", hint=suggest(name, brought).partition(" (")[0])
    pip.uninstall(brought[name])
    return brought[name]
