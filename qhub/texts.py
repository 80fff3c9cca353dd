"""Which texts a run calibrates and evaluates on: what the user gave, else the model's own, else the demo's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qhub.errors import UsageError
from qhub.plugins import Plugins
from qhub.route.recipe import file_sha256
from qhub.types import Calibration, ModelSource, Recipe

FALLBACK_MODEL = "demo:llm"  # whose texts serve a model that brings none
_KINDS = "(.txt, .jsonl or .parquet)"


def of_run(source: ModelSource, given: tuple[str | None, str | None], plugins: Plugins) -> tuple[Path, Path]:
    """(calibration, evaluation) for a run of `source`; `given` is a file, or the name of a model that brings a text.

    :raises UsageError: when there is none, or it does not exist.
    """
    brought = {name: (model.calibration, model.evaluation) for name, model in plugins.models.items()}
    fallback = brought.get(FALLBACK_MODEL, (None, None))
    own = source.path / "calibration.txt", source.path / "heldout.txt"
    calibration = _first(given[0], {name: pair[0] for name, pair in brought.items()}, source.calibration, own[0], fallback[0])
    evaluation = _first(given[1], {name: pair[1] for name, pair in brought.items()}, source.evaluation, own[1], fallback[1])
    if calibration is None or evaluation is None:
        what, option = ("calibration", "--calib") if calibration is None else ("evaluation", "--eval")
        raise UsageError(f"`{source.name}` brings no {what} text", hint=f"give one: `{option} TEXT` {_KINDS}")
    return calibration, evaluation


def again(recipe: Recipe, source: ModelSource, given: tuple[str | None, str | None], plugins: Plugins) -> Recipe:
    """`recipe` with its texts where they are now: `given`, else where they were, else a brought text of the same content.

    :raises UsageError: when a text is given and does not exist, or the recipe has no use for it.
    """

    def now(name: str, data: Calibration | None, path: str | None) -> Calibration | None:
        if path is not None:
            found = _first(path, {model.name: getattr(model, name) for model in plugins.models.values()})
            if data is None:
                raise UsageError(f"the recipe uses no {name} text: `{path}` would change nothing", hint="leave it out")
            return replace(data, data=str(found.resolve())) if found else data
        if data is None or Path(data.data).is_file():
            return data
        same = (text for text in _brought(source, plugins) if text.is_file() and file_sha256(text) == data.data_sha256)
        return replace(data, data=str(next(same, Path(data.data)).resolve()))

    calibration = now("calibration", recipe.calibration, given[0])
    return replace(recipe, calibration=calibration, evaluation=now("evaluation", recipe.evaluation, given[1]))


def _brought(source: ModelSource, plugins: Plugins) -> Iterator[Path]:
    """Every text that comes with the model, or with a plugin."""
    yield from (source.path / "calibration.txt", source.path / "heldout.txt")
    for model in plugins.models.values():
        yield from (path for path in (model.calibration, model.evaluation) if path is not None)


def borrowed(recipe: Recipe, plugins: Plugins) -> str | None:
    """What to say where a model that is not the demo is judged by the demo's texts."""
    demo = plugins.models.get(FALLBACK_MODEL)
    if demo is None or recipe.model == FALLBACK_MODEL:
        return None
    pairs = ((recipe.calibration, demo.calibration, "--calib"), (recipe.evaluation, demo.evaluation, "--eval"))
    options = [option for data, path, option in pairs if data is not None and path is not None and Path(data.data) == path.resolve()]
    if not options:
        return None
    yours = " and ".join(f"`{option}`" for option in options)
    return f"`{recipe.model}` brings no text, so {FALLBACK_MODEL}'s is used, which may be unlike its own: give yours with {yours}"


def of_evaluation(folder: Path, recorded: Calibration | None, given: str | None, plugins: Plugins) -> Path:
    """The text to measure the model in `folder` on; `recorded` is what its run used.

    :raises UsageError: when there is none, or it does not exist.
    """
    brought = {name: model.evaluation for name, model in plugins.models.items()}
    text = _first(given, brought, Path(recorded.data) if recorded else None, folder / "heldout.txt", brought.get(FALLBACK_MODEL))
    if text is None:
        raise UsageError(f"`{folder}` brings no evaluation text", hint=f"give one: `--data TEXT` {_KINDS}")
    return text


def _first(given: str | None, brought: Mapping[str, Path | None], *others: Path | None) -> Path | None:
    if given is None:
        return next((path for path in others if path is not None and path.is_file()), None)
    path = brought.get(given) or Path(given)
    if not path.is_file():
        what = "is a folder, not a text" if path.is_dir() else "does not exist"
        raise UsageError(f"data file `{given}` {what}", hint=f"give a text {_KINDS}")
    return path


def describe(path: Path, samples: int, seq_len: int) -> Calibration:
    """The text at `path` as a recipe records it."""
    return Calibration(str(path.resolve()), file_sha256(path), samples, seq_len)
