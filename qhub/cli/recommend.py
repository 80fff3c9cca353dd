"""`qhub recommend`: which way to take a model to a device, and why; nothing is run and nothing heavy imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.errors import NoRouteError
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.route.registry import Registry
    from qhub.types import Recommendation, Route, Target

_COLUMNS = ("target", "method", "scheme", "format", "runs with", "size", "memory")


@click.command()
@click.argument("model")
@click.option("--target", "targets", metavar="T", multiple=True, help="The device, see `qhub targets`; default: host. May be repeated.")
@click.option("--all-targets", is_flag=True, help="Every known device.")
@click.option("--plugin", "wanted", metavar="P", multiple=True, help="Use what this plugin offers; may be repeated.")
@click.option("--scheme", metavar="S", help="How numbers are stored, e.g. w4a16-g128-asym; default: what suits the model.")
@click.option("--retrain/--no-retrain", default=False, show_default=True, help="Whether the model may be trained again.")
@click.option("--max-drop", metavar="PCT", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Largest accuracy drop.")
@click.option("--max-size", metavar="MB", type=click.FloatRange(min=0, min_open=True), help="Largest size of the weights.")
@click.option("--max-latency", metavar="MS", type=click.FloatRange(min=0, min_open=True), help="Longest time per token, or per item.")
@click.option("--max-memory", metavar="GB", type=click.FloatRange(min=0, min_open=True), help="Largest memory while running.")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at once.")
@click.option("--explain", is_flag=True, help="Also show every rejected route with its reason.")
@click.option("--mermaid", is_flag=True, help="Print the flowchart with the path of the best route marked, as mermaid.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def recommend(app: App, /, model: str, *, explain: bool, mermaid: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - above
    """Rank the routes from MODEL to devices.

    MODEL is a folder or a name such as demo:llm. Exits with 3 when no route fits the device and the goals.
    """
    from qhub.route.registry import load_registry

    registry = load_registry()
    targets = _targets(app, registry, options["targets"], all_targets=options["all_targets"])
    found = _recommend(app, model, {**options, "targets": targets, "registry": registry})
    if as_json:
        app.output.json(to_json(found))
    elif mermaid:
        from qhub.route.flowchart import mermaid as draw

        app.output.print(draw(found.routes[0].path).rstrip())
    else:
        if options["all_targets"]:
            _show_matrix(app, found, targets, registry)
        else:
            _show(app, found)
        if explain:
            _show_rejected(app, found)
    if not any(route.fits for route in found.routes):
        first = found.routes[0]
        why = next((text for text in first.warnings if text.startswith("does not fit")), "does not fit")
        hint = "choose a larger device (`qhub recommend MODEL --all-targets`), a smaller model, or wider goals"
        raise NoRouteError(f"no route from `{model}` fits: {first.method} at `{first.scheme}` on `{first.target}` {why}", hint=hint)


def _recommend(app: App, model: str, options: dict[str, Any]) -> Recommendation:
    from qhub.route.profile import profile
    from qhub.route.recommend import recommend as rank
    from qhub.types import Goals, Scheme

    scheme = Scheme.parse(options["scheme"]) if options["scheme"] else None
    goals = Goals(
        max_drop_pct=options["max_drop"],
        max_size_bytes=_times(options["max_size"], 1e6),
        max_latency_ms=options["max_latency"],
        max_memory_bytes=_times(options["max_memory"], 1e9),
        retrain=options["retrain"],
        batch=options["batch"],
    )
    found = profile(model, app.plugins)
    more = {"wanted": options["wanted"], "scheme": scheme, "registry": options["registry"]}
    return rank(found, options["targets"], goals, app.plugins, **more)


def _targets(app: App, registry: Registry, names: Sequence[str], *, all_targets: bool) -> list[Target]:
    from qhub.route.registry import HOST, find_target, known_targets

    if all_targets:
        names = [HOST, *known_targets(app.plugins, registry)]
    return [find_target(name, app.plugins, registry) for name in dict.fromkeys(names or [HOST])]


def _times(value: float | None, factor: float) -> int | None:
    return None if value is None else int(value * factor)


def to_json(found: Recommendation) -> dict[str, Any]:
    """The document of `recommend --json`: of tokens_per_s and latency_ms, the one that the model's task has."""
    from qhub.types import as_json

    document: dict[str, Any] = as_json(found)
    unused = "latency_ms" if found.model.task == "llm" else "tokens_per_s"
    for route in document["routes"]:
        del route["estimates"][unused]
    return document


def _title(found: Recommendation) -> str:
    model = found.model
    quantity = f"{model.parameters / 1e6:.4g} M parameters, {human_bytes(model.weight_bytes)} in {model.dtype}"
    if not model.complete:
        quantity = "parameters and size unknown from these files"
    return f"{model.source}: {model.architecture} ({model.task}), {quantity}"


def _show(app: App, found: Recommendation) -> None:
    from qhub.route.matrix import RIGHT, speed_unit

    columns = (*_COLUMNS, speed_unit(found.model.task), "drop", "fits")
    app.output.table(columns, [_row(route) for route in found.routes], title=_title(found), right=RIGHT)
    best = list({route.target: route for route in reversed(found.routes)}.values())[::-1]
    for route in best:
        _explain(app, route)


def _show_matrix(app: App, found: Recommendation, targets: Sequence[Target], registry: Registry) -> None:
    from qhub.route.matrix import RIGHT, columns, refused, rows

    app.output.table(columns(found.model.task), list(rows(found, targets, registry)), title=_title(found), right=RIGHT)
    for why in refused(found, targets):
        app.output.print(f"no route: {why}")
    app.output.print("\nestimates, nothing is measured; why: `qhub recommend MODEL --target T`")


def _show_rejected(app: App, found: Recommendation) -> None:
    app.output.print("\nrejected")
    for rejected in found.rejected:
        app.output.print(f"  {rejected.route}: {rejected.reason}")
    if not found.rejected:
        app.output.print("  nothing")


def _row(route: Route) -> tuple[str, ...]:
    from qhub.route.matrix import drop, speed

    size, memory = human_bytes(route.estimates.weight_bytes), human_bytes(route.estimates.peak_bytes)
    way = (route.exporter or "–", route.runtime or "–")
    return (route.target, route.method, route.scheme, *way, size, memory, speed(route), drop(route), "yes" if route.fits else "no")


def _explain(app: App, route: Route) -> None:
    app.output.print(f"\n{route.target}: {route.method} at {route.scheme}")
    app.output.print("  path: " + " → ".join(f"{step.question} {step.answer}" for step in route.path))
    for kind, texts in (("because", route.reasons), ("but", route.warnings)):
        for text in texts:
            app.output.print(f"  {kind}: {text}")
    missing = [name for name in route.missing if not any(f"`{name}`" in text for text in route.warnings)]
    if missing:
        app.output.print(f"  missing: `pip install {' '.join(missing)}`")
    app.output.print(f"  estimate: {route.estimates.basis}")
