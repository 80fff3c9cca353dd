"""Repeat a finished run from its recipe, and say that all is the same, or exactly what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import pipeline
from qhub.errors import QhubError, UsageError
from qhub.events import Events, Progress
from qhub.pipeline import Plan, RunRequest
from qhub.plugins import Plugins
from qhub.preflight import ChangedInputs, same_recipe
from qhub.prove.report import Report, load
from qhub.route.circumstances import changes
from qhub.route.recipe import digest, file_sha256
from qhub.rundir import RECIPE, STATE, RunDir, Settings
from qhub.types import Difference, Recipe, as_json

if TYPE_CHECKING:
    import torch

    from qhub.quantize.store import QuantizedWeights

FILE = "reproduction.json"
UNREADABLE = "unreadable"
_ABSENT = "absent"


@dataclass(frozen=True)
class Repeat:
    """What will be repeated. `plan` is None where what the run started from is no longer the same: `differences` says what."""

    run: Path
    recorded: Report
    plan: Plan | None
    resume: bool
    differences: tuple[Difference, ...]
    circumstances: tuple[Difference, ...]  # versions and hardware: no fault in themselves


@dataclass(frozen=True)
class TensorDifference:
    """How many numbers of one tensor differ. `part` is codes, scales, zeros, float (not quantized) or unreadable."""

    layer: str
    part: str
    count: int
    different: int


@dataclass(frozen=True)
class Reproduction:
    """The outcome. `compared` counts files, tensors and metrics."""

    run: str
    repeat: str | None
    same: bool
    differences: tuple[Difference, ...]
    layers: tuple[TensorDifference, ...]
    circumstances: tuple[Difference, ...]
    compared: Mapping[str, int]


def plan(run: Path, request: RunRequest, plugins: Plugins) -> Repeat:
    """What repeating the finished run in `run` takes; `request` says where and how: `out`, `device`, and where its
    files are now: `model`, `calib`, `eval`.

    A repeat that was interrupted is continued. :raises QhubError: when the run is not finished, or cannot be repeated here.
    """
    recorded, path = load(run), run / RECIPE
    recipe = pipeline.read_recipe(path)
    if request.model is None and not Path(recipe.model_path).is_dir() and recipe.model not in plugins.models:
        message = f"the model of `{run}` is no longer at `{recipe.model_path}`"
        raise QhubError(message, hint=f"say where it is: `qhub reproduce {run} --model MODEL`")
    settings = RunDir.open(run).settings if (run / STATE).exists() else Settings("auto")
    device = settings.device if request.device == "auto" else request.device
    out = _out(run, request.out, recipe)
    resume = (out / RECIPE).exists()
    asked = replace(request, recipe=path, out=out, device=device, resume=resume, max_memory_bytes=settings.max_memory_bytes)
    circumstances = changes(recipe)
    if device not in (settings.device, "auto") and settings.device != "auto":
        circumstances += (Difference("hardware", "device", settings.device, device),)
    edited = _edited(recorded, recipe)
    try:
        return Repeat(run, recorded, pipeline.plan(asked, plugins), resume, edited, circumstances)
    except ChangedInputs as error:
        return Repeat(run, recorded, None, resume, (*edited, *error.differences), circumstances)


def _out(run: Path, asked: Path | None, recipe: Recipe) -> Path:
    """Where the repeat goes: where the user says, else beside the run, to go on with a repeat that did not come to its end."""
    if asked is not None:
        if asked.resolve() == run.resolve():
            raise UsageError(f"`{asked}` is the run itself", hint="give another directory: `--out DIR`")
        if (asked / FILE).exists():
            raise UsageError(f"`{asked}` already holds a repeat", hint="give a new directory: `--out DIR`")
        return asked
    name = (run if run.name not in ("", "..") else run.resolve()).name
    folder = run.parent if run.name not in ("", "..") else run.resolve().parent
    paths = (folder / f"{name}-repeat{'' if number == 1 else f'-{number}'}" for number in range(1, 1000))
    free = (path for path in paths if not path.exists() or (same_recipe(path, recipe) and not (path / FILE).exists()))
    found = next(free, None)
    if found is None:
        raise UsageError(f"`{run}` was repeated a thousand times", hint="give a directory: `--out DIR`")
    return found


def _edited(recorded: Report, recipe: Recipe) -> tuple[Difference, ...]:
    """Whether the recipe is still the one that the report was made by."""
    now = digest(recipe)
    return () if now == recorded.recipe_digest else (Difference("recipe", RECIPE, recorded.recipe_digest, now),)


def carry_out(repeat: Repeat, plugins: Plugins, events: Events) -> Reproduction:
    """Repeat the run, compare, and leave the outcome in the repeat's directory.

    :raises QhubError: from a stage; the same call goes on from what was finished.
    """
    if repeat.plan is None:
        return Reproduction(str(repeat.run), None, False, repeat.differences, (), repeat.circumstances, {})
    out = repeat.plan.out
    report = pipeline.run(repeat.plan, plugins, events, resume=repeat.resume)
    with events.stage("compare"):
        folders = _compare_folders(repeat.run / "quantized", out / "quantized", events)
        metrics, figures = _metric_differences(repeat.recorded, report)
        artifacts = (*_damaged(repeat), *_artifact_differences(repeat.recorded, report))
    differences = (*repeat.differences, *folders.differences, *artifacts, *metrics)
    compared = {"files": folders.files, "tensors": folders.tensors, "metrics": figures}
    found = Reproduction(str(repeat.run), str(out), not differences, differences, folders.layers, repeat.circumstances, compared)
    RunDir(out).write(FILE, as_json(found))
    return found


@dataclass(frozen=True)
class _Folders:
    differences: tuple[Difference, ...]
    layers: tuple[TensorDifference, ...]
    files: int
    tensors: int


def _compare_folders(before: Path, after: Path, events: Events) -> _Folders:
    """Which files below two folders differ, by sha256, and in which tensors."""
    folders = (before, after)
    names = sorted({path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()})
    progress = Progress(events, "compare", sum(_is_shard(name) for name in names))
    tensors = _Tensors.open(before, after)
    files: list[Difference] = []
    layers: list[TensorDifference] = []
    for name in names:
        first, second = (file_sha256(folder / name) if (folder / name).is_file() else _ABSENT for folder in folders)
        if first != second:
            files.append(Difference("file", f"{before.name}/{name}", first, second, _changed_keys(before / name, after / name)))
            layers += tensors.differences(name) if _is_shard(name) else ()
        if _is_shard(name):
            progress.block(progress.done_here, name)
    return _Folders(tuple(files), tuple(layers), len(names), tensors.count)


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors")


def _changed_keys(before: Path, after: Path) -> str:
    """The keys whose values differ in two JSON files; empty for anything else."""
    try:
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    except (OSError, ValueError):
        return ""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return ""
    return ", ".join(key for key in dict.fromkeys((*first, *second)) if first.get(key) != second.get(key))


def _damaged(repeat: Repeat) -> Iterator[Difference]:
    """Artifacts of the run that are no longer what its report says."""
    from qhub.quantize.store import folder_digest

    for artifact in repeat.recorded.artifacts:
        path = repeat.run / artifact.path
        found = folder_digest(path)[1] if path.is_dir() else _ABSENT
        if found != artifact.sha256:
            yield Difference("damage", artifact.path, artifact.sha256, found)


def _artifact_differences(before: Report, after: Report) -> Iterator[Difference]:
    first, second = ({artifact.path: artifact.sha256 for artifact in report.artifacts} for report in (before, after))
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            yield Difference("artifact", name, first.get(name, _ABSENT), second.get(name, _ABSENT))


def _metric_differences(before: Report, after: Report) -> tuple[tuple[Difference, ...], int]:
    """Which figures of two reports differ in any bit, and how many there are; times and memory are none."""
    first, second = dict(_metrics(before)), dict(_metrics(after))
    names = list(dict.fromkeys((*first, *second)))
    changed = [name for name in names if not _alike(first.get(name), second.get(name))]
    return tuple(Difference("metric", name, repr(first.get(name)), repr(second.get(name))) for name in changed), len(names)


def _metrics(report: Report) -> Iterator[tuple[str, float | str | None]]:
    for group, result in (("float", report.float_model), ("quantized", report.quantized), ("baseline", report.baseline)):
        if result is not None:
            yield from ((f"{group}.{item.name}", getattr(result, item.name)) for item in fields(result))
    for artifact in report.artifacts:
        yield f"{artifact.format}.max_abs_diff", artifact.parity.max_abs_diff


def _alike(first: object, second: object) -> bool:
    both_nan = isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second)
    return both_nan or first == second


@dataclass(frozen=True)
class _Tensors:
    """The tensors of two folders; None where one of them cannot be read as a model."""

    pair: tuple[QuantizedWeights, QuantizedWeights] | None

    @classmethod
    def open(cls, before: Path, after: Path) -> _Tensors:
        """Read the headers of both."""
        from qhub.quantize.store import QuantizedWeights

        try:
            return cls((QuantizedWeights(before), QuantizedWeights(after)))
        except (QhubError, OSError, KeyError):
            return cls(None)  # that its files differ is said

    @property
    def count(self) -> int:
        """How many there are."""
        return 0 if self.pair is None else sum(1 for _ in self.pair[0])

    def differences(self, shard: str) -> Iterator[TensorDifference]:
        """How many codes, scales and zeros differ of each layer in `shard`, and numbers of each float tensor; one at a time."""
        if self.pair is None:
            return
        first, second = self.pair
        for name in (name for name in first if _file_of(first, name) == shard and name in second):
            try:
                yield from _tensor_differences(first, second, name)
            except (RuntimeError, ValueError, LookupError):  # parts of a tensor that do not fit together
                yield TensorDifference(name.removesuffix(".weight"), UNREADABLE, 0, 0)


def _file_of(weights: QuantizedWeights, name: str) -> str:
    stored = name if name in weights.files else f"{name.removesuffix('.weight')}.weight_packed"
    return weights.files[stored].file.name


def _tensor_differences(first: QuantizedWeights, second: QuantizedWeights, name: str) -> Iterator[TensorDifference]:
    layer = name.removesuffix(".weight")
    quantized = layer in first.schemes and layer in second.schemes
    for part, one, other in _parts(first, second, layer) if quantized else [("float", first.read(name), second.read(name))]:
        count = max(one.numel(), other.numel())
        different = _different(one, other) if one.shape == other.shape else count
        if different:
            yield TensorDifference(layer, part, count, different)


def _parts(first: QuantizedWeights, second: QuantizedWeights, layer: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    one, other = first.layer(layer), second.layer(layer)
    yield "codes", one.codes, other.codes
    yield "scales", one.scale, other.scale
    yield "zeros", one.zero, other.zero


def _different(one: torch.Tensor, other: torch.Tensor) -> int:
    both_nan = (one != one) & (other != other)
    return int(((one != other) & ~both_nan).sum())
