"""`qhub plugins`: which methods, formats and engines there are, and how to get, write and check one. One file per command."""

from __future__ import annotations

import click

from qhub.cli.plugins.check import check
from qhub.cli.plugins.info import info
from qhub.cli.plugins.install import install
from qhub.cli.plugins.list import list_plugins
from qhub.cli.plugins.matrix import matrix
from qhub.cli.plugins.new import new
from qhub.cli.plugins.search import search
from qhub.cli.plugins.uninstall import uninstall


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def plugins(ctx: click.Context, *, as_json: bool) -> None:
    """List, find, install, write and check plugins."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins, as_json=as_json)


for _command in (list_plugins, info, search, install, uninstall, new, check, matrix):
    plugins.add_command(_command)
