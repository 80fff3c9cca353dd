"""`qhub plugins matrix`: what carries what: schemes by quantizer and exporter, devices by runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App

if TYPE_CHECKING:
    from qhub.types import Target

SCHEMES = (
    "w2a16-g64-asym", "w3a16-g128-asym", "w4a16-g128-asym", "w4a16-g32-asym", "w4a16-g32-sym", "w4a16-channel-sym", "w8a16",
    "w8a8-static", "w8a8-dynamic", "nf4", "fp16", "bf16",
)  # fmt: skip


@click.command()
@click.option("--task", default="llm", metavar="TASK", help="For models of this task (llm, vision, nlp, …); default llm.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def matrix(app: App, *, task: str, as_json: bool) -> None:
    """Show which installed plugin carries which scheme and format, and runs on which device."""
    found = _matrix(app, task)
    if as_json:
        app.output.json(found)
        return
    for key in ("schemes", "targets"):
        parts = [part for part in found["components"] if key in part]
        rows = [(name, *(_cell(part[key][name]) for part in parts)) for name in (found[key] if parts else ())]
        app.output.table((key, *(_heading(part) for part in parts)), rows)
        app.output.print()
    for entry in found["planned"]:
        app.output.print(f"{entry['name']} ({entry['state']}): {' '.join([*entry['formats'], *entry['schemes']])}")


def _cell(answer: str | None) -> str:
    return "yes" if answer is None else "–"


def _heading(part: dict[str, Any]) -> str:
    formats = f" ({', '.join(part['formats'])})" if part["formats"] else ""
    return f"{part['kind']} {part['name']}{formats}"


def _matrix(app: App, task: str) -> dict[str, Any]:
    """Every answer: None where a component takes it, else its reason."""
    from qhub.cli.plugins.describe import how_to_get
    from qhub.route.host import detect
    from qhub.route.registry import known_targets, load_registry

    registry = load_registry()
    targets = [detect(), *known_targets(app.plugins, registry).values()]
    offered = {info.name for info in app.plugins.infos}
    absent = [entry for name, entry in registry.index.items() if name not in offered]
    return {
        "task": task,
        "schemes": SCHEMES,
        "targets": [target.name for target in targets],
        "components": [*_by_scheme(app, task), *_by_target(app, targets)],
        "planned": [{"name": one.name, "state": how_to_get(one), "formats": one.formats, "schemes": one.schemes} for one in absent],
    }


def _by_scheme(app: App, task: str) -> Iterator[dict[str, Any]]:
    from qhub.route.ways import ask
    from qhub.testing.declared import example_profile
    from qhub.types import Scheme

    profile = replace(example_profile(), task=task)  # type: ignore[arg-type]
    parts: list[Any] = [*app.plugins.quantizers.values(), *app.plugins.exporters.values()]
    for part in parts:
        formats = [part.format] if hasattr(part, "format") else []
        answers = {text: ask(part.reject, profile, Scheme.parse(text)) for text in SCHEMES}
        yield {"kind": "exporter" if formats else "quantizer", "name": part.name, "formats": formats, "schemes": answers}


def _by_target(app: App, targets: Iterable[Target]) -> Iterator[dict[str, Any]]:
    from qhub.route.ways import ask

    for name, runtime in app.plugins.runtimes.items():
        answers = {target.name: ask(runtime.reject, target) for target in targets}
        yield {"kind": "runtime", "name": name, "formats": list(runtime.formats), "targets": answers}
