"""`qhub run`: the whole way, from a model to files that run on the target and a report."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qhub.cli import App
from qhub.errors import ExitCode, PluginError, UsageError
from qhub.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from qhub.pipeline import Plan, RunRequest
    from qhub.prove.report import Report
    from qhub.types import Calibration, Recipe

DEFAULT_MODEL = "demo:llm"
RECIPE = "recipe.yaml"
#: What a recipe determines; the other options only say where and how it is carried out.
_IN_RECIPE = ("plugins", "target", "scheme", "max_drop_pct", "seed", "samples", "seq_len", "overrides", "preprocess", "retrain")


@click.command()
@click.argument("model", required=False)
@click.option("--plugin", "plugins", metavar="P", multiple=True, help="Use what this plugin offers; may be given more than once.")
@click.option("--target", metavar="T", default="host", show_default=True, help="The device, see `qhub targets`; host is this machine.")
@click.option("--scheme", metavar="S", help="How numbers are stored, e.g. w4a16-g128-asym; default: the route's.")
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Repeat what this recipe.yaml says.")
@click.option("--calib", metavar="DATA", help="Calibration text, or labelled data (docs/data.md); default: what comes with the model.")
@click.option("--eval", metavar="DATA", help="Evaluation text, or labelled data (docs/data.md); default: what comes with the model.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Weights (.safetensors) of the module that MODEL, `module:function`, returns."
)
@click.option("--preprocess", type=click.Path(path_type=Path), help="How items become inputs, where the model does not say (docs/data.md).")
@click.option("--retrain/--no-retrain", default=False, help="Whether the model may be trained again; default: it may not.")
@click.option("--max-drop", "max_drop_pct", metavar="PCT", type=click.FloatRange(min=0), help="Largest accuracy drop; default 2.")
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Default: runs/<model>-<plugin>-<target>.")
@click.option("--max-memory", "max_memory_gb", metavar="GB", type=click.FloatRange(min=0, min_open=True), help="Stay below this memory.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True, help="Where blocks are computed."
)
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Which calibration samples are drawn.")
@click.option("--samples", metavar="N", type=click.IntRange(min=1), help="Number of calibration samples.")
@click.option("--seq-len", metavar="TOKENS", type=click.IntRange(min=2), help="Tokens per sample of text.")
@click.option("--override", "overrides", metavar="PATTERN=SCHEME", multiple=True, help="Another scheme, or float, for matching layers.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python code run.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the report (or the plan) as one JSON document.")
@click.pass_obj
def run(app: App, /, *, dry_run: bool, as_json: bool, **options: Any) -> ExitCode:  # noqa: ANN401 - the options above
    """Quantize MODEL for a device, export it, evaluate it and report.

    MODEL is a folder or a name such as demo:llm; without one, the model folder in the working directory, else demo:llm.
    """
    request = _request(app, options)

    from qhub import pipeline
    from qhub.cli.report import show

    plan = pipeline.plan(request, app.plugins)
    if dry_run:
        _print_plan(app, plan, as_json=as_json)
        return ExitCode.OK
    app.output.text("\n".join(f"{name}: {text}" for name, text in plan_rows(plan)))
    for text in plan.route.warnings:
        app.output.warning(text)
    report = _carry_out(app, plan, resume=request.resume)
    if as_json:
        app.output.json(report.to_json())
    else:
        show(app.output, report)
    app.output.text(f"files: {plan.out}")
    if plan.finish is not None:
        app.output.text(f"next: {plan.finish}")
    return ExitCode.OK if report.targets.met else ExitCode.TARGETS_NOT_MET


def _carry_out(app: App, plan: Plan, *, resume: bool) -> Report:
    """Run the plan; while it runs, and where it leaves something to go on from, an error says how to resume."""
    from qhub import pipeline
    from qhub.events import Events

    app.resume = f"qhub run --resume --out {shlex.quote(str(plan.out))}"
    try:
        return pipeline.run(plan, app.plugins, Events(listener=app.output.progress), resume=resume)
    except Exception as error:
        if not (plan.out / RECIPE).exists():
            app.resume = None
        elif isinstance(error, PluginError):
            raise PluginError(error.message, hint=f"{error.hint}; once it is mended, `{app.resume}` goes on") from error
        raise


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """What will happen, as (what, text)."""
    route, estimate = plan.route, plan.estimate
    engine = f"run by {route.runtime}" if route.runtime else "no engine for it here"
    way = [route.scheme, f"{route.exporter} files" if route.exporter else "no exporter", engine]
    rows = [
        ("model", f"{plan.recipe.model}: {plan.profile.architecture}, {plan.profile.parameters / 1e6:.4g} M parameters"),
        ("route", f"{route.method} for {route.target}: {', '.join(way)}"),
        ("text" if plan.profile.task == "llm" else "data", _texts(plan.recipe)),
        ("size", f"{human_bytes(plan.profile.weight_bytes)} → {human_bytes(estimate['weight_bytes'])}"),
        ("needs", f"{human_bytes(estimate['peak_bytes'])} memory{_corrected(plan)}, {human_bytes(estimate['disk_bytes'])} disk"),
    ]
    if estimate.get("seconds") is not None:
        basis = next((item.basis for item in plan.expected if item.what == "seconds"), "")
        rows.append(("time", f"about {human_seconds(estimate['seconds'])} to quantize ({basis})"))
    return [*rows, ("out", str(plan.out))]


def _corrected(plan: Plan) -> str:
    """The basis of the memory estimate, where it is more than arithmetic."""
    return next((f" ({item.basis})" for item in plan.expected if item.what == "peak_bytes" and item.value != item.plain), "")


def _texts(recipe: Recipe) -> str:
    named = (("calibration", recipe.calibration), ("evaluation", recipe.evaluation))
    return ", ".join(f"{what} {_amount(data)} of {_short(data.data)}" for what, data in named if data is not None)


def _amount(data: Calibration) -> str:
    return f"{data.samples} × {data.seq_len} tokens" if data.seq_len else f"up to {data.samples} items"


def _short(path: str) -> str:
    """A path as seen from here; of one elsewhere only the end."""
    here = os.path.relpath(path)
    return f"…/{Path(path).name}" if here.startswith(os.pardir) else here


def _print_plan(app: App, plan: Plan, *, as_json: bool) -> None:
    if as_json:
        app.output.json(plan)
        return
    app.output.table(("", "plan"), plan_rows(plan))
    for text in plan.route.warnings:
        app.output.warning(text)


def _request(app: App, options: dict[str, Any]) -> RunRequest:
    gigabytes = options.pop("max_memory_gb")
    memory = None if gigabytes is None else int(gigabytes * 1e9)
    options |= _source(app, options["model"], options["recipe"], options["out"], resume=options["resume"])

    from qhub.pipeline import RunRequest

    return RunRequest(**options, tune=False, max_memory_bytes=memory)


def _source(app: App, model: str | None, recipe: Path | None, out: Path | None, *, resume: bool) -> dict[str, Any]:
    """What to work on when MODEL is omitted: the recipe, the interrupted run, the folder here, the demo; said on stderr."""
    if recipe is not None:
        _refuse_changes(f"`{recipe}`", "leave out `--recipe` to start from options")
    if model is not None or recipe is not None:
        return {}
    if resume and out is not None:
        if not (out / RECIPE).exists():
            from qhub.preflight import nothing_to_resume

            raise nothing_to_resume(out)
        _refuse_changes(f"the run in `{out}`", f"`qhub run --resume --out {out}`")
        return {"recipe": out / RECIPE}
    if Path("config.json").exists():
        app.output.text("no MODEL given: taking the model folder here")
        return {"model": "."}
    app.output.text(f"no MODEL given: taking {DEFAULT_MODEL}")
    return {"model": DEFAULT_MODEL}


def _refuse_changes(what: str, hint: str) -> None:
    """Refuse options that a recipe already answers, rather than ignoring them.

    :raises UsageError: naming the first one.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in _IN_RECIPE:
            raise UsageError(f"{what} already says what `{parameter.opts[0]}` would change", hint=hint)
