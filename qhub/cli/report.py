"""`qhub report`: what a run found, again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhub.cli import App

if TYPE_CHECKING:
    from qhub.cli.output import Output
    from qhub.prove.report import Report

TEXT_COLUMNS = ("parity", "reason", "basis")


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report as one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of tables.")
@click.pass_obj
def report(app: App, run: Path, html: Path | None, *, as_json: bool) -> None:
    """Show what RUN, a directory that `qhub run` wrote, found."""
    from qhub.prove.render import to_html
    from qhub.prove.report import load

    found = load(run)
    if html is not None:
        html.write_text(to_html(found), encoding="utf-8")
    if as_json:
        app.output.json(found.to_json())
    else:
        show(app.output, found)
    if html is not None:
        app.output.text(f"wrote {html}")


def show(output: Output, found: Report) -> None:
    """The report's tables and verdict on stdout, its warnings on stderr."""
    from qhub.prove.render import tables, verdict

    for table in tables(found):
        numbers = [column for column in table.columns[1:] if column not in TEXT_COLUMNS]
        output.table(table.columns, table.rows, title=table.title, right=numbers)
        output.print()
    output.print(verdict(found))
    for title, texts in (("checked", found.checked), ("not checked", found.not_checked)):
        for text in texts:
            output.print(f"{title}: {text}")
    for text in found.warnings:
        output.warning(text)
