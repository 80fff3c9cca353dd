"""`qhub plugins install`: a plugin into the running environment, or with `--isolated` into one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App

if TYPE_CHECKING:
    from qhub.cli.plugins.wanted import Wanted
    from qhub.isolation.environments import Lock


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--isolated", is_flag=True, help="Give it an environment of its own, where it cannot conflict with others.")
@click.option("--pypi", is_flag=True, help="Take `qhub-NAME` from the package index, although qhub does not know it.")
@click.option(
    "--from-lock",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --isolated: the exact versions of an environment's lock.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def install(app: App, name: str, *, isolated: bool, pypi: bool, from_lock: Path | None, as_json: bool) -> None:
    """Install plugin NAME (or the one in a folder or wheel) and see that it loads."""
    from qhub.cli.plugins.wanted import find_wanted
    from qhub.errors import UsageError

    if from_lock is not None and not isolated:
        raise UsageError("`--from-lock` sets the versions of an environment of its own", hint="add `--isolated`")
    wanted = find_wanted(name, pypi=pypi)
    there = next((info for info in app.plugins.infos if info.name == wanted.name), None)
    if there is not None:
        app.output.text(f"`{wanted.name}` {there.version} is already installed")
    elif isolated:
        _apart(app, wanted, from_lock)
    else:
        _here(app, wanted)
    facts = _loaded(wanted)
    if as_json:
        app.output.json(facts)
        return
    app.output.print(f"{facts['name']} {facts['version']}: {facts['state']}")


def _here(app: App, wanted: Wanted) -> None:
    from qhub.cli.plugins import pip
    from qhub.errors import QhubError

    app.output.text(f"looking at what `{wanted.distribution}` would change here")
    if changed := pip.changes(wanted.requirement):
        what = ", ".join(f"`{change.distribution}` {change.before} → {change.after}" for change in changed)
        message = f"installing `{wanted.distribution}` here would change {what}, which other plugins use"
        raise QhubError(message, hint=f"`qhub plugins install {wanted.given} --isolated` gives it an environment of its own")
    pip.install(wanted.requirement)


def _apart(app: App, wanted: Wanted, from_lock: Path | None) -> None:
    from qhub.isolation.install import Asked, install

    lock = None if from_lock is None else _read_lock(from_lock)
    install(Asked(wanted.name, wanted.requirement, lock), app.output.text)


def _read_lock(path: Path) -> Lock:
    from qhub.errors import QhubError, UsageError
    from qhub.isolation.environments import LOCK, Lock, environments_dir

    try:
        return Lock.load(path)
    except QhubError as error:
        raise UsageError(error.message, hint=f"give an environment's lock file: `{environments_dir() / 'NAME' / LOCK}`") from None


def _loaded(wanted: Wanted) -> dict[str, Any]:
    """What a new process says of the plugin.

    :raises PluginError: when it does not find it, or finds it broken.
    """
    from qhub.errors import PluginError

    command = [sys.executable, "-m", "qhub", "plugins", "info", wanted.name, "--json"]
    ran = subprocess.run(command, env={**os.environ, "QHUB_PLUGINS": wanted.name}, capture_output=True, text=True, check=False)
    facts: dict[str, Any] = json.loads(ran.stdout) if ran.returncode == 0 else {"state": ran.stderr.strip()}
    if "version" not in facts or facts["state"].startswith("broken"):
        message = f"`{wanted.distribution}` is installed, but plugin `{wanted.name}` does not load: {facts['state']}"
        raise PluginError(message, hint=f"`qhub plugins uninstall {wanted.name}` removes it again")
    return facts
