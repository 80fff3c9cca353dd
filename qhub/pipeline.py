"""The sentence: MODEL → profile → recommend → recipe → quantize → export → open → evaluate → Report.

`plan` decides from headers alone; `run` carries the plan out, stage by stage, each from files to files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qhub import feeding, history, preflight, texts
from qhub.errors import DamagedModelError, NoRouteError, QhubError, Unsupported, UsageError
from qhub.events import Events
from qhub.expect import Expectation, engine_of, expect, expect_speed, learned, read
from qhub.graph.store import is_graph
from qhub.interfaces import Quantizer
from qhub.isolation.apart import check_apart, execute_at_home
from qhub.plugins import Plugins, missing_modules
from qhub.prove.report import FILE, Report, load
from qhub.quiet import quiet_libraries
from qhub.route.circumstances import changes, distributions, hardware, in_words, installed
from qhub.route.profile import profile, resolve
from qhub.route.recipe import Choices, from_yaml, make_recipe, to_yaml
from qhub.route.recommend import named, recommend
from qhub.route.registry import find_target, load_registry
from qhub.route.ways import read_wanted
from qhub.rundir import EXPECTED, RECIPE, STATE, WALKED, RunDir, Settings, locked
from qhub.stage import STAGES
from qhub.types import FLOAT, Goals, ModelProfile, ModelSource, Recipe, Route, Scheme, as_json

SAMPLES, EVALUATION_SAMPLES, SEQ_LEN = 64, 60, 512
EVALUATION_ITEMS = 10_000  # of labelled data


@dataclass(frozen=True)
class RunRequest:
    """What the user asked of `qhub run`."""

    model: str | None = None
    plugins: tuple[str, ...] = ()
    target: str = "host"
    scheme: str | None = None
    recipe: Path | None = None
    calib: str | None = None
    eval: str | None = None
    tune: bool = False
    max_drop_pct: float | None = None
    out: Path | None = None
    resume: bool = False
    max_memory_bytes: int | None = None
    device: str = "auto"
    seed: int = 0
    samples: int | None = None
    seq_len: int | None = None
    overrides: tuple[str, ...] = ()
    trust_remote_code: bool = False
    retrain: bool = False
    weights: Path | None = None
    preprocess: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does anything."""

    recipe: Recipe
    route: Route
    profile: ModelProfile
    out: Path
    settings: Settings
    estimate: dict[str, int | float | None]
    finish: str | None = None  # which plugin would take the result to the target, where nothing installed does
    expected: tuple[Expectation, ...] = ()  # the estimate, where this machine's history corrected it; refusals do not depend on it


def plan(request: RunRequest, plugins: Plugins) -> Plan:
    """Decide the route and write down the recipe; reads headers, and the files once for their digest.

    :raises QhubError: for everything that can be known to fail before work begins.
    """
    if request.recipe is not None:
        return _repeat(request, request.recipe, plugins)
    _check_names(request, plugins)
    source = resolve(request.model or texts.FALLBACK_MODEL, plugins, request.weights)
    found = profile(source, plugins)
    if feeding.is_network(found):
        found = feeding.with_task(found, source, (request.calib, request.eval), plugins)
    goals = Goals(retrain=request.retrain)
    goals = goals if request.max_drop_pct is None else replace(goals, max_drop_pct=request.max_drop_pct)
    route = _route(request, found, goals, plugins)
    preflight.check_model(found)
    there = replace(source, path=source.path.resolve())  # a run may be resumed from another folder
    recipe = check_apart(make_recipe(there, route, goals, _choices(request, source, found, route, plugins)), found, plugins)
    preflight.check_overrides(found, recipe, plugins)
    _check_data(recipe, found)
    return _checked(request, recipe, _with_warnings(route, recipe, plugins), found)


def _check_data(recipe: Recipe, found: ModelProfile) -> None:
    """Read the beginning of what the run calibrates and evaluates on."""
    for data in (recipe.calibration, recipe.evaluation):
        if not feeding.is_network(found):
            preflight.check_text(data)
        elif data is not None:
            feeding.check_feed(feeding.feed(recipe, data))


def _repeat(request: RunRequest, path: Path, plugins: Plugins) -> Plan:
    """The plan of a recipe that exists."""
    recipe = read_recipe(path)
    source = _model_of(request, recipe, path, plugins)
    there = replace(recipe, model_path=str(source.path))
    given = (request.calib, request.eval)
    of_items = any(data is not None and not data.seq_len for data in (recipe.calibration, recipe.evaluation))
    there = feeding.again(there, given) if of_items else texts.again(there, source, given, plugins)
    preflight.check_inputs(there, path)
    changed = () if request.resume else changes(recipe)
    used = distributions({*recipe.method.split("+"), recipe.exporter, recipe.runtime, recipe.model}, plugins)
    recipe = replace(there, versions=installed(used), hardware=hardware())
    found = profile(source, plugins)
    if feeding.is_network(found):
        found = feeding.with_task(found, source, (recipe.evaluation.data if recipe.evaluation else None,) * 2, plugins)
    wanted = tuple(name for name in (*recipe.method.split("+"), recipe.exporter) if name)
    again = replace(request, plugins=wanted, target=recipe.target, scheme=recipe.scheme)
    route = _route(again, found, recipe.goals, plugins)
    route = replace(route, exporter=recipe.exporter, runtime=recipe.runtime)
    preflight.check_model(found)
    preflight.check_options(recipe, plugins)
    recipe = check_apart(recipe, found, plugins)
    preflight.check_overrides(found, recipe, plugins)
    said = f"not all is as `{path}` was written with, so bytes may differ: {in_words(changed)}" if changed else None
    return _checked(request, recipe, _with_warnings(route, recipe, plugins, said), found)


def _model_of(request: RunRequest, recipe: Recipe, path: Path, plugins: Plugins) -> ModelSource:
    """The model of a recipe: where the user says, else where it was.

    :raises QhubError: when it is not there.
    """
    there = Path(recipe.model_path)
    if request.model is not None:
        source = resolve(request.model, plugins, request.weights)
    elif there.exists() or recipe.model not in plugins.models:
        source = ModelSource(recipe.model, there, "")
    else:
        source = plugins.models[recipe.model]
    if not source.path.exists():
        message = f"the model of `{path}` is no longer at `{source.path}`"
        raise QhubError(message, hint=f"say where it is: `qhub run MODEL --recipe {path}{' --resume' if request.resume else ''}`")
    return replace(source, path=source.path.resolve())


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    :raises QhubError: naming the file, when it cannot be read or is no recipe.
    """
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"`{path}` is not a recipe: it is not text", hint="give the recipe.yaml of a run") from None
    except UsageError as error:
        raise UsageError(f"`{path}`: {error.message}", hint=error.hint) from None


def _with_warnings(route: Route, recipe: Recipe, plugins: Plugins, changed: str | None = None) -> Route:
    """The route with what is to be said of texts that were borrowed, of a method whose memory cannot be told, and of what `changed`."""
    method = plugins.quantizers.get(recipe.method)
    whole = f"`{recipe.method}` holds the whole model in memory, which the memory said to be needed does not count"
    said = (changed, texts.borrowed(recipe, plugins), whole if method is not None and method.whole else None)
    return replace(route, warnings=(*route.warnings, *(text for text in said if text is not None)))


def _checked(request: RunRequest, recipe: Recipe, route: Route, found: ModelProfile) -> Plan:
    """The plan, once experts, directory, disk, memory and device are known to serve."""
    preflight.check_experts(found, trust_remote_code=request.trust_remote_code)
    needs = preflight.estimate(found, recipe, request.max_memory_bytes)
    out = _out(request, recipe)
    preflight.check_disk(out, int(needs["disk_bytes"] or 0))
    preflight.check_out(out, recipe, resume=request.resume)
    preflight.check_memory(found, recipe, int(needs["peak_bytes"] or 0), request.max_memory_bytes)
    engine = engine_of(request.device, bounded=request.max_memory_bytes is not None)
    expected = (*expect(found, recipe, needs, engine), *expect_speed(recipe, route))
    figures = {item.what: item.value for item in expected if item.what in needs}
    return Plan(recipe, route, found, out, _settings(request), {**needs, **figures}, _finish(route, found), expected)


def _finish(route: Route, found: ModelProfile) -> str | None:
    """Which plugin would take the result the rest of the way, where nothing installed does."""
    if route.runtime is not None:
        return None
    registry = load_registry()
    target = registry.targets.get(route.target)
    finishers = () if target is None else registry.finishers(target, found.task)
    return f"{named(finishers)} would finish it on `{route.target}`" if finishers else None


def _check_names(request: RunRequest, plugins: Plugins) -> None:
    """Names are checked first: a misspelt one should not cost reading a model."""
    read_wanted(request.plugins, plugins, load_registry())
    find_target(request.target, plugins)
    if request.scheme is not None:
        Scheme.parse(request.scheme)
    dict(_overrides(request.overrides))


def _route(request: RunRequest, found: ModelProfile, goals: Goals, plugins: Plugins) -> Route:
    scheme = None if request.scheme is None else Scheme.parse(request.scheme)
    target = find_target(request.target, plugins)
    ranked = recommend(found, [target], goals, plugins, wanted=request.plugins, scheme=scheme)
    route = ranked.routes[0]
    absent = [name for name in route.method.split("+") if name not in plugins.quantizers]
    if absent:
        message = f"the route for `{found.source}` needs `{absent[0]}`, which is not installed"
        raise NoRouteError(message, hint=f"`qhub recommend {found.path} --explain` shows what is possible")
    for part in (plugins.quantizers[name] for name in route.method.split("+")):
        modules = missing_modules(part)
        if modules:
            message = f"`{part.name}` does not work here: `{'`, `'.join(modules)}` cannot be imported"
            raise NoRouteError(message, hint=f"`pip install {part.distribution or f'qhub-{part.name}'}`")
    return route


def _choices(request: RunRequest, source: ModelSource, found: ModelProfile, route: Route, plugins: Plugins) -> Choices:
    used = distributions({*route.method.split("+"), route.exporter, route.runtime, source.name}, plugins)
    if feeding.is_network(found):
        count = max(plugins.quantizers[name].samples for name in route.method.split("+"))
        return _items(replace(request, samples=request.samples or count), source, used, plugins)
    seq_len = min(request.seq_len or SEQ_LEN, found.context_length or SEQ_LEN)
    calibration_path, evaluation_path = texts.of_run(source, (request.calib, request.eval), plugins)
    needs = any(plugins.quantizers[name].needs for name in route.method.split("+"))
    calibration = texts.describe(calibration_path, request.samples or SAMPLES, seq_len) if needs else None
    evaluation = texts.describe(evaluation_path, EVALUATION_SAMPLES, seq_len)
    overrides = {**_undividable(found, route), **dict(_overrides(request.overrides))}
    return Choices(calibration, evaluation, overrides, seed=request.seed, distributions=used)


def _items(request: RunRequest, source: ModelSource, used: tuple[str, ...], plugins: Plugins) -> Choices:
    """The choices for a network: labelled data rather than texts."""
    calibration, evaluation = feeding.data_of_run(source, (request.calib, request.eval), plugins)
    return Choices(
        feeding.describe(calibration, request.samples or Quantizer.samples),
        feeding.describe(evaluation, EVALUATION_ITEMS),
        dict(_overrides(request.overrides)),
        seed=request.seed,
        distributions=used,
        preprocess=feeding.read_preprocess(request.preprocess),
    )


def _undividable(found: ModelProfile, route: Route) -> dict[str, str]:
    """Layers whose inputs the group size does not divide stay float; the route's warnings say so."""
    scheme, layers = Scheme.parse(route.scheme), found.linears()
    size = scheme.group_size
    bad = [layer.name for layer in layers if size is not None and layer.shape[-1] % size]
    if bad and len(bad) == len(layers):
        widths = ", ".join(sorted({str(layer.shape[-1]) for layer in layers}))
        message = f"group size `{size}` divides no layer of `{found.source}` (inputs: {widths}), e.g. `{bad[0]}`"
        fitting = [smaller for smaller in (128, 64, 32, 16) if any(layer.shape[-1] % smaller == 0 for layer in layers)]
        raise Unsupported(message, hint=f"try `--scheme {replace(scheme, group_size=fitting[0] if fitting else None)}`")
    return {name.removesuffix(".weight"): FLOAT for name in bad}


def _overrides(given: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in given:
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"`--override {text}` is not PATTERN=SCHEME", hint="write it like `--override 'down_proj=float'`")
        yield pattern, scheme if scheme == FLOAT else str(Scheme.parse(scheme))


def _settings(request: RunRequest) -> Settings:
    device = request.device if request.device == "auto" else _device(request.device)
    return Settings(device, request.max_memory_bytes, request.trust_remote_code)


def _device(name: str) -> str:
    """The device that blocks are computed on; auto takes an accelerator if there is one.

    :raises UsageError: when it was asked for and is not there.
    """
    if name == "cpu":
        return name
    import torch  # a plan without it is made in a tenth of the time

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, present in there.items() if present), "cpu")
    if not there[name]:
        raise UsageError(f"device `{name}` is not available here", hint="use `--device cpu`")
    return name


def _out(request: RunRequest, recipe: Recipe) -> Path:
    """The run directory: the one asked for; else a new one under runs/, or when resuming the unfinished one."""
    if request.out is not None:
        return request.out
    if request.resume and request.recipe is not None and (request.recipe.parent / STATE).exists():
        return request.recipe.parent
    name = f"{_safe(recipe.model)}-{_safe(recipe.method)}-{recipe.target}"
    paths = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000)]
    if request.resume:
        found = next((path for path in paths if not (path / FILE).exists() and preflight.same_recipe(path, recipe)), None)
        if found is None:
            hint = "name its directory: `qhub run --resume --out DIR`; leave out `--resume` to start a run"
            raise UsageError(f"`runs/` has no unfinished run of this recipe for `{recipe.model}`", hint=hint)
        return found
    free = next((path for path in paths if not path.exists()), None)
    if free is None:
        raise UsageError("`runs/` holds a thousand runs of this model", hint="give a directory: `--out DIR`")
    return free


def _safe(name: str) -> str:
    text = Path(name).resolve().name if "/" in name or name == "." else name
    return "".join(letter if letter.isalnum() or letter in ".+_" else "-" for letter in text).strip("-") or "model"


def run(found: Plan, plugins: Plugins, events: Events, *, resume: bool = False) -> Report:
    """Carry the plan out; with `resume` only the stages that are not done.

    :raises QhubError: from a stage; what was finished stays, and `resume` goes on from there. Where nothing was, or what
        was finished comes from a damaged model, the directory is as empty as it was.
    """
    with locked(found.out):
        preflight.check_out(found.out, found.recipe, resume=resume)  # again: another process may have been faster
        directory = _directory(found, events, resume=resume)
        for text in found.route.warnings:
            events.emit("warning", text=text, said=True)
        try:
            if "report" not in directory.done and not (directory.path / EXPECTED).exists():
                directory.work.mkdir(exist_ok=True)
                directory.write(EXPECTED, as_json(found.expected))
                directory.write(WALKED, as_json(found.route.path))
            for name in STAGES:
                if name not in directory.done:
                    directory = execute_at_home(name, directory, plugins, events)
        except Exception as error:
            if isinstance(error, DamagedModelError) or not (resume or directory.holds_results):
                directory.discard()
            raise
        report = load(directory.path)
        if (directory.path / EXPECTED).exists():  # no earlier process came this far
            history.record(learned(report, read(directory.read(EXPECTED))))
        shutil.rmtree(directory.work, ignore_errors=True)
        return report


def _directory(found: Plan, events: Events, *, resume: bool) -> RunDir:
    """The run directory, new or as an interrupted process left it."""
    events.file = found.out / "events.jsonl"
    settings = replace(found.settings, device=_device(found.settings.device))
    if not resume:
        return RunDir.create(found.out, settings, to_yaml(found.recipe))
    began = read_recipe(found.out / RECIPE)
    recipe = to_yaml(replace(found.recipe, versions=began.versions, hardware=began.hardware))
    directory = RunDir(found.out).tidy()
    directory = directory.create(found.out, settings, recipe, done=_done(found.out))
    changed = [change for change in changes(began) if change.kind == "version"]
    if changed and directory.holds_results:
        text = "installed versions changed since this run began, so its bytes may differ from an uninterrupted run's"
        events.warning(f"{text}: {in_words(changed)}")
    return directory


def _done(out: Path) -> tuple[str, ...]:
    """Finished stages; without a state none is known to be, and each finds what it needs not do again."""
    return RunDir.open(out).done if (out / STATE).exists() else ()


def evaluate(path: Path, plugins: Plugins, events: Events, data: str | None) -> dict[str, Any]:
    """Measure a QuantizedModel, an artifact that holds one, or a run, on a text or labelled data, beside the float model if it is there."""
    from qhub.prove.measure import measure

    folder = path / "quantized" if (path / "quantized").is_dir() else path
    run_recipe = next((parent / RECIPE for parent in (path, *path.resolve().parents[:2]) if (parent / RECIPE).exists()), None)
    recipe = None if run_recipe is None else read_recipe(run_recipe)
    if is_graph(folder):
        from qhub.networks import evaluate_folder

        with quiet_libraries():
            return evaluate_folder(folder, recipe, data, plugins)
    used = None if recipe is None else recipe.evaluation
    found = profile(ModelSource(folder.name, folder, ""), plugins)
    text = texts.of_evaluation(folder, used, data, plugins)
    length = used.seq_len if used else min(SEQ_LEN, found.context_length or SEQ_LEN)
    source = Path(recipe.model_path) if recipe and Path(recipe.model_path).is_dir() else None
    with quiet_libraries():
        return measure(folder, source, texts.describe(text, used.samples if used else EVALUATION_SAMPLES, length), events)
