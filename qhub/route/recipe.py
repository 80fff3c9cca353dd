"""A `Recipe`: route and options as YAML, everything needed to repeat a run, and the digest of what determines its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qhub.errors import QhubError, UsageError
from qhub.route.circumstances import hardware, installed
from qhub.types import FLOAT, Calibration, Goals, ModelSource, Recipe, Route, Scheme, as_json

_CHUNK_BYTES = 1 << 22
_PIECE_BYTES = 64 << 20
#: Files beside the weights that decide what a model computes and which tokens it sees.
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "preprocess.json",
)
#: What the bytes of the result depend on; where the files lie, and which versions and machine made them, is not part of it.
_DETERMINES = ("model_sha256", "method", "scheme", "overrides", "options", "seed")
_Reader = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user chose beyond the route."""

    calibration: Calibration | None = None
    evaluation: Calibration | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    distributions: tuple[str, ...] = ()  # of the plugins that the run uses
    preprocess: Mapping[str, Any] | None = None


def make_recipe(source: ModelSource, route: Route, goals: Goals, choices: Choices | None = None) -> Recipe:
    """The recipe of `route` for `source`; reads all of the model's files once for their digest."""
    choices = choices or Choices()
    return Recipe(
        model=source.name,
        model_path=str(source.path),
        model_sha256=model_sha256(source.path),
        target=route.target,
        method=route.method,
        scheme=route.scheme,
        exporter=route.exporter,
        runtime=route.runtime,
        calibration=choices.calibration,
        evaluation=choices.evaluation,
        overrides=dict(choices.overrides),
        options={name: dict(options) for name, options in choices.options.items()},
        seed=choices.seed,
        goals=goals,
        versions=installed(choices.distributions),
        hardware=hardware(),
        preprocess=choices.preprocess,
    )


def digest(recipe: Recipe) -> str:
    """sha256 over everything in `recipe` that determines the bytes of the result: not paths, goals or versions."""
    data = as_json(recipe)
    decisive = {key: data[key] for key in _DETERMINES}
    if recipe.preprocess is not None:
        decisive["preprocess"] = data["preprocess"]
    if recipe.calibration is not None:
        calibration = as_json(recipe.calibration)
        del calibration["data"]
        decisive["calibration"] = calibration
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def model_sha256(path: Path) -> str:
    """sha256 of a model: of its file, or over its folder's files."""
    return file_sha256(path) if path.is_file() else folder_sha256(path)


def folder_sha256(folder: Path) -> str:
    """sha256 over the names, sizes and contents of a model's config, tokenizer and safetensors files.

    The contents are streamed in pieces of 64 MB, each hashed on its own, so that all cores take part.

    :raises QhubError: when a file cannot be read.
    """
    files = sorted({*folder.glob("*.safetensors"), *(path for name in _CONFIGS if (path := folder / name).is_file())})
    total = hashlib.sha256()
    try:
        sizes = {path: path.stat().st_size for path in files}
        pieces = [(path, offset) for path, size in sizes.items() for offset in range(0, max(size, 1), _PIECE_BYTES)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for (path, offset), content in zip(
                pieces, pool.map(lambda piece: _piece_sha256(piece[0], piece[1], _PIECE_BYTES), pieces), strict=True
            ):
                total.update(f"{path.name} {sizes[path]} {offset} {content}\n".encode())
    except OSError as error:
        raise QhubError(f"`{error.filename}` cannot be read: {error.strerror}", hint="check that the model is complete") from None
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of one file, as `sha256sum` prints it; streamed."""
    return _piece_sha256(path, 0, path.stat().st_size)


def _piece_sha256(path: Path, offset: int, piece_bytes: int) -> str:
    """sha256 of at most `piece_bytes` of `path` from `offset` on."""
    result = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, piece_bytes)))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while piece_bytes > 0 and (count := file.readinto(buffer[: min(len(buffer), piece_bytes)])):
            result.update(buffer[:count])
            piece_bytes -= count
    return result.hexdigest()


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a person reads it; `from_yaml` reads it back."""
    import yaml

    return yaml.safe_dump(as_json(recipe), sort_keys=False, allow_unicode=True, width=120)


def from_yaml(text: str) -> Recipe:
    """Read a recipe.

    :raises UsageError: when it is not YAML, a key is unknown or missing, or a value is not what its key allows.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = str(error).splitlines()[0]
        raise UsageError(f"the recipe is not YAML: {where}", hint="every run directory holds one to start from: recipe.yaml") from None
    values = _read("recipe", data, _RECIPE)
    for key in ("model", "model_path", "model_sha256", "target", "method", "scheme"):
        if key not in values:
            raise UsageError(f"the recipe has no `{key}`", hint="every run directory holds a complete one: recipe.yaml")
    return Recipe(**values)


def _read(where: str, data: Any, readers: Mapping[str, _Reader]) -> dict[str, Any]:  # noqa: ANN401 - YAML
    if not isinstance(data, dict):
        raise _bad(where, data, "a mapping")
    for key in data:
        if key not in readers:
            raise UsageError(f"`{where}` has the unknown key `{key}`", hint=f"known: {', '.join(readers)}")
    return {key: readers[key](f"{where}.{key}", value) for key, value in data.items()}


def _bad(where: str, value: Any, expected: str) -> UsageError:  # noqa: ANN401 - YAML
    return UsageError(f"`{where}` is `{value}`, which is not {expected}", hint=f"write {expected} there")


def _text(where: str, value: Any) -> str:  # noqa: ANN401 - YAML
    if not isinstance(value, str):
        raise _bad(where, value, "a text")
    return value


def _scheme(where: str, value: Any) -> str:  # noqa: ANN401 - YAML
    return str(Scheme.parse(_text(where, value)))


def _count(where: str, value: Any) -> int:  # noqa: ANN401 - YAML
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(where, value, "a number from 0 up")
    return value


def _positive(where: str, value: Any) -> int:  # noqa: ANN401 - YAML
    if _count(where, value) < 1:
        raise _bad(where, value, "a number from 1 up")
    return int(value)


def _quantity(where: str, value: Any) -> float:  # noqa: ANN401 - YAML
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise _bad(where, value, "a number from 0 up")
    return float(value)


def _switch(where: str, value: Any) -> bool:  # noqa: ANN401 - YAML
    if not isinstance(value, bool):
        raise _bad(where, value, "`true` or `false`")
    return value


def _optional(reader: _Reader) -> _Reader:
    return lambda where, value: None if value is None else reader(where, value)


def _mapping(reader: _Reader) -> _Reader:
    def read(where: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - YAML
        if not isinstance(value, dict):
            raise _bad(where, value, "a mapping")
        return {str(key): reader(f"{where}.{key}", item) for key, item in value.items()}

    return read


def _override(where: str, value: Any) -> str:  # noqa: ANN401 - YAML
    return FLOAT if value == FLOAT else _scheme(where, value)


def _anything(where: str, value: Any) -> Any:  # noqa: ANN401 - a plugin's option; the plugin checks it
    return value


def _calibration(where: str, value: Any) -> Calibration:  # noqa: ANN401 - YAML
    readers: dict[str, _Reader] = {"data": _text, "data_sha256": _text, "samples": _positive, "seq_len": _count}
    values = _read(where, value, readers)
    if "data" not in values:
        raise UsageError(f"`{where}` has no `data`", hint="write the path of a text file there")
    return Calibration(**values)


def _goals(where: str, value: Any) -> Goals:  # noqa: ANN401 - YAML
    return Goals(**_read(where, value, _GOALS))


_GOALS: dict[str, _Reader] = {
    "max_drop_pct": _quantity,
    "max_size_bytes": _optional(_count),
    "max_latency_ms": _optional(_quantity),
    "max_memory_bytes": _optional(_count),
    "retrain": _switch,
    "batch": _positive,
}
_RECIPE: dict[str, _Reader] = {
    "model": _text,
    "model_path": _text,
    "model_sha256": _text,
    "target": _text,
    "method": _text,
    "scheme": _scheme,
    "exporter": _optional(_text),
    "runtime": _optional(_text),
    "calibration": _optional(_calibration),
    "evaluation": _optional(_calibration),
    "overrides": _mapping(_override),
    "options": _mapping(_mapping(_anything)),
    "seed": _count,
    "goals": _goals,
    "versions": _mapping(_text),
    "hardware": _mapping(_text),
    "preprocess": _optional(_mapping(_anything)),
}
assert {item.name for item in fields(Recipe)} == set(_RECIPE)  # a field without a reader could not be read back
