"""`qhub reproduce`: repeat a run from its recipe, and say that all is the same, or exactly what is not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.errors import ExitCode

if TYPE_CHECKING:
    from qhub.reproduce import Repeat, Reproduction
    from qhub.types import Difference

_SHOWN = 30
_DIGITS = 12


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Where the repeat goes; default: RUN-repeat.")
@click.option("--model", metavar="MODEL", help="Where the model is now; default: where the recipe says.")
@click.option("--calib", metavar="DATA", help="Where the calibration text is now.")
@click.option("--eval", metavar="DATA", help="Where the evaluation text is now.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Where blocks are computed; default: as in RUN.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python code run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def reproduce(app: App, /, run: Path, *, as_json: bool, **options: Any) -> ExitCode:  # noqa: ANN401 - the options above
    """Repeat RUN, a directory that qhub run wrote, and compare every file and metric.

    Exits with 0 when all is the same, with 1 when something is not. After Ctrl-C the same command goes on.
    """
    from qhub import reproduce as reproducing
    from qhub.pipeline import RunRequest

    options["device"] = options["device"] or "auto"
    repeat = reproducing.plan(run, RunRequest(**options), app.plugins)
    found = _carry_out(app, repeat)
    if as_json:
        app.output.json(found)
    else:
        _show(app, found)
    if found.repeat is not None:
        app.output.text(f"files: {found.repeat}")
    return ExitCode.OK if found.same else ExitCode.FAILED


def _carry_out(app: App, repeat: Repeat) -> Reproduction:
    from qhub import reproduce as reproducing
    from qhub.cli.run import plan_rows
    from qhub.events import Events

    if repeat.plan is not None:
        app.output.text("\n".join(f"{name}: {text}" for name, text in plan_rows(repeat.plan)))
        for text in repeat.plan.route.warnings:
            app.output.warning(text)
        app.resume = f"qhub reproduce {shlex.quote(str(repeat.run))} --out {shlex.quote(str(repeat.plan.out))}"
    return reproducing.carry_out(repeat, app.plugins, Events(listener=app.output.progress))


def _show(app: App, found: Reproduction) -> None:
    rows = [*map(_row, found.differences), *_layer_rows(found), *map(_row, found.circumstances)]
    if rows:
        shown = rows if len(rows) <= _SHOWN else [*rows[:_SHOWN], ("…", f"{len(rows) - _SHOWN} more: `--json` names all", "", "")]
        app.output.table(("what", "name", "recorded", "now"), shown)
        app.output.print()
    app.output.print(verdict(found))


def _row(difference: Difference) -> tuple[str, ...]:
    name = f"{difference.name}: {difference.part}" if difference.part else difference.name
    return (difference.kind, name, _short(difference.recorded), _short(difference.found))


def _short(text: str) -> str:
    """A sha256 by its first digits; JSON has all of it."""
    return text[:_DIGITS] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _layer_rows(found: Reproduction) -> Iterator[tuple[str, ...]]:
    for row in found.layers:
        what = f"{row.different} of {row.count} {row.part} differ" if row.count else "cannot be read"
        yield ("layer", row.layer, "", what)


def verdict(found: Reproduction) -> str:
    """The outcome in one sentence: what was compared or what differs, and what may be why."""
    other = _not_as_recorded(found.circumstances)
    if found.same:
        counts = ", ".join(f"{found.compared[name]} {name}" for name in ("files", "tensors", "metrics"))
        return f"same: {counts}" + (f"; {other}, which made no difference" if other else "")
    what = ", ".join(_counted(found))
    if found.repeat is None:
        return f"differs: {what}; nothing was repeated, since it would start from something else"
    return f"differs: {what}; " + (f"{other}, which may be why" if other else "versions and hardware are as recorded")


def _not_as_recorded(circumstances: Sequence[Difference]) -> str:
    kinds = {item.kind for item in circumstances}
    if kinds == {"version", "hardware"}:
        return "versions and hardware are not as recorded"
    return "versions are not as recorded" if "version" in kinds else "the hardware is not as recorded" if kinds else ""


def _counted(found: Reproduction) -> Iterator[str]:
    kinds = [difference.kind for difference in found.differences]
    for kind in dict.fromkeys(kinds):
        yield f"{kinds.count(kind)} {_plural(kind, kinds.count(kind))}"
    layers = len({row.layer for row in found.layers})
    if layers:
        yield f"{layers} {_plural('layer', layers)}"
    elif found.compared.get("tensors"):
        yield "no layer"


def _plural(word: str, count: int) -> str:
    return word if count == 1 or word in ("data", "damage") else f"{word}s"
