"""The sentence: MODEL → profile → recommend → recipe → quantize → export → open → evaluate → Report.

`plan` decides from headers alone; `run` carries the plan out, stage by stage, each from files to files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qhub.errors import NoRouteError, QhubError, Unsupported, UsageError
from qhub.events import Events
from qhub.plugins import Plugins
from qhub.prove.report import Report, load
from qhub.route.profile import profile, resolve
from qhub.route.recipe import FLOAT, Choices, digest, file_sha256, folder_sha256, from_yaml, make_recipe, to_yaml
from qhub.route.recommend import recommend
from qhub.route.registry import find_target
from qhub.rundir import RECIPE, RunDir, Settings
from qhub.stage import STAGES, execute
from qhub.types import Calibration, Goals, ModelProfile, ModelSource, Recipe, Route, Scheme

SAMPLES, EVALUATION_SAMPLES, SEQ_LEN = 64, 60, 512
FALLBACK_MODEL = "demo:llm"  # whose texts serve a model that brings none
_BASE_BYTES = 700 << 20  # Python with torch and transformers, measured


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


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does anything."""

    recipe: Recipe
    route: Route
    profile: ModelProfile
    out: Path
    settings: Settings
    estimate: dict[str, int | float | None]


def plan(request: RunRequest, plugins: Plugins) -> Plan:
    """Decide the route and write down the recipe; reads headers, and the files once for their digest.

    :raises QhubError: for everything that can be known to fail before work begins.
    """
    if request.recipe is not None:
        return _repeat(request, plugins)
    source = resolve(request.model or FALLBACK_MODEL, plugins)
    found = profile(source, plugins)
    goals = Goals() if request.max_drop_pct is None else Goals(max_drop_pct=request.max_drop_pct)
    route = _route(request, found, goals, plugins)
    choices = _choices(request, source, found, route, plugins)
    recipe = make_recipe(source, route, goals, choices)
    return _checked(Plan(recipe, route, found, _out(request, recipe), _settings(request), _estimate(found, recipe)), request)


def _repeat(request: RunRequest, plugins: Plugins) -> Plan:
    """The plan of a recipe that exists."""
    assert request.recipe is not None
    recipe = from_yaml(request.recipe.read_text(encoding="utf-8"))
    path = Path(recipe.model_path)
    source = ModelSource(recipe.model, path, "") if path.is_dir() else resolve(recipe.model, plugins)
    if folder_sha256(source.path) != recipe.model_sha256:
        message = f"the model at `{source.path}` is not the one that `{request.recipe}` was written for (its sha256 differs)"
        raise QhubError(message, hint=f"get the same files again, or start a new run: `qhub run {recipe.model}`")
    recipe = replace(recipe, model_path=str(source.path))
    found = profile(source, plugins)
    wanted = tuple(name for name in (*recipe.method.split("+"), recipe.exporter) if name)
    again = replace(request, plugins=wanted, target=recipe.target, scheme=recipe.scheme)
    route = _route(again, found, recipe.goals, plugins)
    route = replace(route, exporter=recipe.exporter, runtime=recipe.runtime)
    return _checked(Plan(recipe, route, found, _out(request, recipe), _settings(request), _estimate(found, recipe)), request)


def _route(request: RunRequest, found: ModelProfile, goals: Goals, plugins: Plugins) -> Route:
    scheme = None if request.scheme is None else Scheme.parse(request.scheme)
    target = find_target(request.target, plugins)
    ranked = recommend(found, [target], goals, plugins, wanted=request.plugins, scheme=scheme)
    route = ranked.routes[0]
    absent = [name for name in route.method.split("+") if name not in plugins.quantizers]
    if absent:
        message = f"the route for `{found.source}` needs `{absent[0]}`, which is not installed"
        raise NoRouteError(message, hint=f"`qhub recommend {found.source} --explain` shows what is possible")
    return route


def _choices(request: RunRequest, source: ModelSource, found: ModelProfile, route: Route, plugins: Plugins) -> Choices:
    seq_len = min(request.seq_len or SEQ_LEN, found.context_length or SEQ_LEN)
    calibration_path, evaluation_path = _texts(request, source, plugins)
    needs = any(plugins.quantizers[name].needs for name in route.method.split("+"))
    calibration = _data(calibration_path, request.samples or SAMPLES, seq_len) if needs else None
    evaluation = _data(evaluation_path, EVALUATION_SAMPLES, seq_len)
    overrides = {**_undividable(found, route), **dict(_overrides(request.overrides))}
    return Choices(calibration=calibration, evaluation=evaluation, overrides=overrides, seed=request.seed)


def _texts(request: RunRequest, source: ModelSource, plugins: Plugins) -> tuple[Path, Path]:
    """(calibration, evaluation): what the user gave, else the model's own, else the demo's."""
    fallback = plugins.models.get(FALLBACK_MODEL)
    beside = {name: source.path / f"{name}.txt" for name in ("calibration", "heldout")}
    calibration = _first(request.calib, source.calibration, beside["calibration"], fallback and fallback.calibration)
    evaluation = _first(request.eval, source.evaluation, beside["heldout"], fallback and fallback.evaluation)
    if calibration is None or evaluation is None:
        what, option = ("calibration", "--calib") if calibration is None else ("evaluation", "--eval")
        raise UsageError(f"`{source.name}` brings no {what} text", hint=f"give one: `{option} TEXT` (.txt, .jsonl or .parquet)")
    return calibration, evaluation


def _first(given: str | None, *others: Path | None) -> Path | None:
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise UsageError(f"data file `{given}` does not exist", hint="give a text, .jsonl or .parquet file")
        return path
    return next((path for path in others if path is not None and path.is_file()), None)


def _data(path: Path, samples: int, seq_len: int) -> Calibration:
    return Calibration(str(path.resolve()), file_sha256(path), samples, seq_len)


def _undividable(found: ModelProfile, route: Route) -> dict[str, str]:
    """Layers whose inputs the group size does not divide stay float; the route's warnings say so."""
    size = Scheme.parse(route.scheme).group_size
    layers = found.linears()
    bad = [layer.name for layer in layers if size is not None and layer.shape[-1] % size]
    if bad and len(bad) == len(layers):
        widths = ", ".join(sorted({str(layer.shape[-1]) for layer in layers}))
        message = f"group size `{size}` divides no layer of `{found.source}` (inputs: {widths}), e.g. `{bad[0]}`"
        raise Unsupported(message, hint="choose a smaller group, or one scale per channel: `--scheme w8a16`")
    return {name.removesuffix(".weight"): FLOAT for name in bad}


def _overrides(texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in texts:
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"`--override {text}` is not PATTERN=SCHEME", hint="write it like `--override 'down_proj=float'`")
        yield pattern, scheme if scheme == FLOAT else str(Scheme.parse(scheme))


def _settings(request: RunRequest) -> Settings:
    return Settings(_device(request.device), request.max_memory_bytes, request.trust_remote_code)


def _device(name: str) -> str:
    """The device that blocks are computed on; auto takes an accelerator if there is one.

    :raises UsageError: when it was asked for and is not there.
    """
    if name == "cpu":
        return name
    import torch

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
    if request.resume and request.recipe is not None and (request.recipe.parent / "state.json").exists():
        return request.recipe.parent
    name = f"{_safe(recipe.model)}-{_safe(recipe.method)}-{recipe.target}"
    for number in range(1, 1000):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (request.resume and _is_unfinished(path, recipe)):
            return path
    raise UsageError("`runs/` holds a thousand runs of this model", hint="give a directory: `--out DIR`")


def _safe(name: str) -> str:
    text = Path(name).resolve().name if "/" in name or name == "." else name
    return "".join(letter if letter.isalnum() or letter in ".+_" else "-" for letter in text).strip("-") or "model"


def _is_unfinished(path: Path, recipe: Recipe) -> bool:
    return not (path / "report.json").exists() and _same_recipe(path, recipe)


def _same_recipe(path: Path, recipe: Recipe) -> bool:
    try:
        return digest(from_yaml((path / RECIPE).read_text(encoding="utf-8"))) == digest(recipe)
    except (OSError, QhubError):
        return False


def _estimate(found: ModelProfile, recipe: Recipe) -> dict[str, int | float | None]:
    """Sizes before work begins: of the result, the peak of memory while quantizing, and the disk a run needs.

    Basis: in memory are Python with torch (measured), the tensors outside the blocks, three copies of the largest block
    (stored, folded in float32), four K×K float32 matrices of its widest layer, and the hidden states of two streams.
    """
    scheme = Scheme.parse(recipe.scheme)
    blocks: dict[int, int] = {}
    for layer in found.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes
    inside = sum(blocks.values())
    largest, outside = max(blocks.values(), default=0), found.weight_bytes - inside
    widest = max((layer.shape[-1] for layer in found.linears()), default=0)
    data = recipe.calibration
    hidden = 0 if data is None else 2 * data.samples * data.seq_len * (found.hidden_size or 0) * 4
    statistics = 0 if data is None else 4 * widest * widest * 4
    quantized = sum(layer.shape[0] * layer.shape[-1] for layer in found.linears()) * scheme.bits_per_weight / 8
    weights = int(outside + quantized)
    peak = _BASE_BYTES + outside + 3 * largest + statistics + min(hidden, 2 << 30)
    copies = 2 if recipe.exporter else 1
    return {"weight_bytes": weights, "peak_bytes": peak, "disk_bytes": copies * weights + 3 * hidden, "seconds": None}


def _checked(found: Plan, request: RunRequest) -> Plan:
    """Refuse before spending: a bound that cannot hold, a disk that is too small, a directory that is in use."""
    bound, peak = request.max_memory_bytes, int(found.estimate["peak_bytes"] or 0)
    data = found.recipe.calibration
    spilled = 0 if data is None else 2 * data.samples * data.seq_len * (found.profile.hidden_size or 0) * 4
    if bound is not None and peak - spilled + min(spilled, bound // 4) > bound:
        message = f"quantizing `{found.profile.source}` needs about `{peak / 1e9:.2f}` GB, more than the bound of {bound / 1e9:.2f} GB"
        raise QhubError(message, hint="give a larger `--max-memory`, or use `--plugin rtn`, which needs no statistics")
    where = next(path for path in (found.out.absolute(), *found.out.absolute().parents) if path.exists())
    if not where.is_dir():
        raise UsageError(f"`{where}` is a file, not a directory", hint="give another directory: `--out DIR`")
    if not os.access(where, os.W_OK):
        raise QhubError(f"`{where}` is not writable", hint="give another directory: `--out DIR`")
    free, needed = shutil.disk_usage(where).free, int(found.estimate["disk_bytes"] or 0)
    if free < needed:
        message = f"`{where}` has `{free / 1e9:.2f}` GB free; the run needs about {needed / 1e9:.2f} GB"
        raise QhubError(message, hint="free some space, or give a directory on another disk: `--out DIR`")
    _check_out(found, resume=request.resume)
    return found


def _check_out(found: Plan, *, resume: bool) -> None:
    out = found.out
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RECIPE).exists():
        raise UsageError(f"`{out}` is not empty and not a run", hint="give a new directory: `--out DIR`")
    if not resume:
        hint = f"continue it: `qhub run --resume --out {out}`, or give a new directory: `--out DIR`"
        raise UsageError(f"`{out}` already holds a run", hint=hint)
    if not _same_recipe(out, found.recipe):
        hint = f"leave out MODEL and options: `qhub run --resume --out {out}`"
        raise UsageError(f"`{out}` holds a run of another recipe", hint=hint)


def run(found: Plan, plugins: Plugins, events: Events, *, resume: bool = False) -> Report:
    """Carry the plan out; with `resume` only the stages that are not done.

    :raises QhubError: from a stage; what was finished stays, and `resume` goes on from there.
    """
    if resume and (found.out / "state.json").exists():
        directory = replace(RunDir.open(found.out), settings=found.settings).save()
    else:
        directory = RunDir.create(found.out, found.settings, to_yaml(found.recipe))
    events.file = directory.events
    for text in found.route.warnings:
        events.emit("warning", text=text, said=True)
    for name in STAGES:
        if name not in directory.done:
            directory = execute(name, directory, plugins, events)
    shutil.rmtree(directory.work, ignore_errors=True)
    return load(directory.path)


def evaluate(path: Path, plugins: Plugins, events: Events, data: str | None) -> dict[str, Any]:
    """Measure a QuantizedModel, an artifact that holds one, or a run, on a text; the float model is compared if it is still there."""
    from qhub.prove.measure import measure

    folder = path / "quantized" if (path / "quantized").is_dir() else path
    run_recipe = next((parent / RECIPE for parent in (path, *path.resolve().parents[:2]) if (parent / RECIPE).exists()), None)
    recipe = None if run_recipe is None else from_yaml(run_recipe.read_text(encoding="utf-8"))
    text = _evaluation_text(folder, recipe, data, plugins)
    samples = recipe.evaluation.samples if recipe and recipe.evaluation else EVALUATION_SAMPLES
    seq_len = recipe.evaluation.seq_len if recipe and recipe.evaluation else SEQ_LEN
    source = Path(recipe.model_path) if recipe and Path(recipe.model_path).is_dir() else None
    return measure(folder, source, Calibration(str(text), file_sha256(text), samples, seq_len), events)


def _evaluation_text(folder: Path, recipe: Recipe | None, data: str | None, plugins: Plugins) -> Path:
    if data is not None and data in plugins.models:
        found = plugins.models[data].evaluation
        if found is not None:
            return found
    recorded = Path(recipe.evaluation.data) if recipe and recipe.evaluation else None
    fallback = plugins.models.get(FALLBACK_MODEL)
    text = _first(data, recorded, folder / "heldout.txt", fallback and fallback.evaluation)
    if text is None:
        raise UsageError(f"`{folder}` brings no evaluation text", hint="give one: `--data TEXT` (.txt, .jsonl or .parquet)")
    return text
