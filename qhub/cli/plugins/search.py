"""`qhub plugins search`: known and installed plugins that have a word in their description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from qhub.cli import App
from qhub.cli.plugins.describe import describe, how_to_get, offers_text


@click.command()
@click.argument("word", metavar="WORD")
@click.option("--pypi", is_flag=True, help="Also ask the package index whether it has a distribution of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def search(app: App, word: str, *, pypi: bool, as_json: bool) -> None:
    """Find plugins whose name, method, format, scheme or summary has WORD."""
    found = [row for row in _known(app) if _has(word, row)]
    if pypi:
        from qhub.cli.plugins.pip import published

        names = {row["distribution"] for row in found}
        found += [row for row in published(word) if row["distribution"] not in names]
    if as_json:
        app.output.json({"word": word, "found": found})
        return
    columns = ("plugin", "offers", "summary", "state")
    app.output.table(columns, [(row["name"], row["offers"], row["summary"], row["state"]) for row in found])
    if not found:
        more = "" if pypi else f"; `qhub plugins search {word} --pypi` asks the package index too"
        app.output.text(f"no known plugin has `{word}`{more}")


def _known(app: App) -> Iterable[dict[str, Any]]:
    """A row for each plugin of the index and each installed one."""
    from qhub.route.registry import load_registry

    index = load_registry().index
    installed = {info.name: describe(info, app.plugins) for info in app.plugins.infos}
    for name, entry in index.items():
        words = [*entry.kinds, *entry.formats, *entry.schemes, *entry.families]
        state = installed[name]["state"] if name in installed else how_to_get(entry)
        yield {"name": name, "distribution": entry.distribution, "offers": " ".join(words), "summary": entry.summary, "state": state}
    for name, row in installed.items():
        if name not in index:
            summary = "; ".join(component["text"] for component in row["components"])
            offers = offers_text(row["offers"])
            yield {"name": name, "distribution": row["distribution"], "offers": offers, "summary": summary, "state": row["state"]}


def _has(word: str, row: Mapping[str, str]) -> bool:
    return any(word.lower() in row[key].lower() for key in ("name", "distribution", "offers", "summary"))
