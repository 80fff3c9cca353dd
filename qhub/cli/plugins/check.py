"""`qhub plugins check`: the conformance kit of `qhub.testing` on one plugin."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhub.cli import App
from qhub.errors import ExitCode

if TYPE_CHECKING:
    from qhub.testing import Check


@click.command()
@click.argument("plugin", metavar="[PLUGIN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def check(app: App, plugin: str | None, *, as_json: bool) -> ExitCode:
    """Check that PLUGIN, a name or a folder (default: this one), does what a plugin must."""
    from qhub.testing import FAIL, find_subject, run_checks

    subject = find_subject(Path() if plugin is None else plugin)
    app.output.text(f"checking `{subject.name}` of `{subject.distribution}` in processes of its own")
    checks = run_checks(subject)
    failed = [one for one in checks if one.outcome == FAIL]
    if as_json:
        rows = [{**asdict(one), "about": one.about} for one in checks]
        app.output.json({"plugin": subject.name, "distribution": subject.distribution, "passed": not failed, "checks": rows})
    else:
        _show(app, checks)
    app.output.text(f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed or were skipped")
    return ExitCode.PLUGIN_FAILED if failed else ExitCode.OK


def _show(app: App, checks: list[Check]) -> None:
    app.output.table(("check", "of", "", "what it shows"), [(one.name, one.component, one.outcome, one.about) for one in checks])
    said = [one for one in checks if one.reason]
    if said:
        app.output.print()
    for one in said:
        app.output.print(f"{one.outcome}: {one.name} of {one.component}: {one.reason}")
