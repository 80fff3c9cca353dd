"""Labelled data for a network as it wants them: which data a run uses, read and preprocessed as the recipe says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.data.classes import fit_labels
from qhub.data.dataset import Dataset
from qhub.data.described import own_steps
from qhub.data.encode import TextSteps
from qhub.data.preprocess import Preprocessor, find_preprocessor, model_inputs
from qhub.data.read import data_sha256, read_data, split_part
from qhub.errors import QhubError, UsageError
from qhub.graph.values import Batch, GraphInput
from qhub.plugins import Plugins
from qhub.types import Calibration, ModelProfile, ModelSource, Recipe, Task

BATCH = 32
NEITHER = -100  # the label of a token that none is asked for
#: Data that lie beside a model under these names are its own.
_OWN = {
    "calibration": ("calibration.npz", "calibration.jsonl", "calibration.csv", "calibration"),
    "evaluation": ("heldout.npz", "heldout.jsonl", "heldout.csv", "heldout"),
}


#: What data of a kind are fed to, where the model does not say what it is for.
_TASKS: Mapping[str, Task] = {"image": "vision", "array": "vision", "text": "nlp", "tokens": "nlp", "audio": "speech"}


def is_network(found: ModelProfile) -> bool:
    """Whether the model is quantized as a graph, not block by block as language models are."""
    return found.task != "llm" or found.format in ("onnx", "pt2")


def with_task(found: ModelProfile, source: ModelSource, given: tuple[str | None, str | None], plugins: Plugins) -> ModelProfile:
    """The profile with what the network is for, taken from the data it is fed where nothing else tells."""
    if found.task != "unknown":
        return found
    with contextlib.suppress(QhubError):  # what cannot be read is said when it is used
        return replace(found, task=_TASKS[read_data(data_of_run(source, given, plugins)[0]).kind])
    return found


@dataclass(frozen=True)
class Feed:
    """A dataset on its way into a network; `name` is what the network calls its only input, if that is another name than the data's."""

    dataset: Dataset
    preprocessor: Preprocessor
    name: str | None = None

    def into(self, inputs: Sequence[GraphInput]) -> Feed:
        """The same data under the names that a network's inputs have."""
        names = [item.name for item in inputs]
        if isinstance(self.preprocessor, TextSteps):
            return replace(self, preprocessor=replace(self.preprocessor, names=tuple(names)))
        return replace(self, name=names[0]) if len(names) == 1 else self

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """The inputs of all items, `size` at a time."""
        for inputs, _ in model_inputs(self.dataset, self.preprocessor, size):
            yield inputs if self.name is None or len(inputs) != 1 else {self.name: next(iter(inputs.values()))}

    def labels(self, size: int = BATCH) -> Iterator[NDArray[Any]]:
        """The labels of the same batches: (B,), or (B, T) with `NEITHER` where there is none."""
        for start in range(0, self.dataset.count, size):
            if self.dataset.kind == "tokens":
                items = self.dataset.items(start, start + size)
                yield self.preprocessor.word_labels(items)  # type: ignore[attr-defined]
            else:
                assert self.dataset.labels is not None
                yield self.dataset.labels[start : start + size]

    @property
    def has_labels(self) -> bool:
        """Whether the data say what is right."""
        return self.dataset.labels is not None or self.dataset.kind == "tokens"

    def sample(self) -> Batch:
        """The inputs of one or two items: what the network takes."""
        return next(self.batches(2))


def feed(recipe: Recipe, data: Calibration, *, seed: int | None = None) -> Feed:
    """The data that a recipe names.

    :raises QhubError: when they cannot be read, or do not fit the model; it names the item.
    """
    return feed_model(Path(recipe.model_path), recipe.preprocess, read_data(data.data, samples=data.samples, seed=seed))


def feed_model(model: Path, preprocess: Mapping[str, Any] | None, dataset: Dataset) -> Feed:
    """`dataset` on its way into `model`; `preprocess` as a recipe has it.

    :raises QhubError: when a label is none of the model's classes, or nothing says how items become inputs.
    """
    classes = class_names(model)
    if classes is not None:
        dataset = fit_labels(dataset, len(classes), classes)
    return Feed(dataset, preprocessor_of(preprocess, model, dataset))


def preprocessor_of(described: Mapping[str, Any] | None, model: Path, dataset: Dataset) -> Preprocessor:
    """How items become inputs: as the recipe describes it, else as the model's files do."""
    if described is not None and dataset.kind not in ("text", "tokens"):
        return own_steps(Path("recipe.yaml"), dict(described), "pixel_values" if dataset.kind == "image" else "x")
    return find_preprocessor(model, dataset.kind)


def class_names(model: Path) -> tuple[str, ...] | None:
    """The names of a model's classes by id, from its config; None where it has none."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        names = {int(number): str(name) for number, name in config["id2label"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return tuple(names.get(number, str(number)) for number in range(len(names)))


def vocabulary_of(model: Path) -> int:
    """Ids that any tokenizer of the model has: below its config's vocabulary, or below 100 where it names none."""
    try:
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 100


def data_of_run(source: ModelSource, given: tuple[str | None, str | None], plugins: Plugins) -> tuple[str, str]:
    """(calibration, evaluation) for a run: what was given (a path, or the name of a model that brings data), else the model's own.

    :raises UsageError: when there is none.
    """
    found = []
    for what, path, option in (("calibration", given[0], "--calib"), ("evaluation", given[1], "--eval")):
        brought = getattr(plugins.models.get(path or ""), what, None) or (getattr(source, what) if path is None else None)
        beside = source.path if source.path.is_dir() else source.path.parent
        own = next((beside / name for name in _OWN[what] if (beside / name).exists()), None) if path is None else None
        chosen = str(brought or own or path or "")
        if not chosen:
            hint = f"give them: `{option} DATA` (a folder of images by class, .npz, .csv, .tsv, .jsonl, or a folder of .wav files)"
            raise UsageError(f"`{source.name}` brings no {what} data", hint=hint)
        split_part(chosen)
        found.append(chosen)
    return found[0], found[1]


def describe(path: str, samples: int) -> Calibration:
    """The data at `path` as a recipe records them; items have no length of their own."""
    file, part = split_part(path)
    where = f"{file.resolve()}#{part}" if part else str(file.resolve())
    return Calibration(where, data_sha256(where), samples, 0)


def again(recipe: Recipe, given: tuple[str | None, str | None]) -> Recipe:
    """`recipe` with its data where they are now.

    :raises UsageError: when data are given that the recipe has no use for, or are not there.
    """

    def now(name: str, data: Calibration | None, path: str | None) -> Calibration | None:
        if path is None:
            return data
        if data is None:
            raise UsageError(f"the recipe uses no {name} data: `{path}` would change nothing", hint="leave it out")
        return replace(data, data=describe(path, data.samples).data)

    calibration = now("calibration", recipe.calibration, given[0])
    return replace(recipe, calibration=calibration, evaluation=now("evaluation", recipe.evaluation, given[1]))


def read_preprocess(path: Path | None) -> dict[str, Any] | None:
    """What a preprocessing file says, to be kept in the recipe.

    :raises UsageError: when it is not there. :raises QhubError: when it cannot be used.
    """
    if path is None:
        return None
    from qhub.data.described import read_mapping

    if not path.is_file():
        raise UsageError(f"preprocessing file `{path}` does not exist", hint="give a preprocess.json or .yaml")
    found = read_mapping(path)
    own_steps(path, found, "x")
    return found


def check_feed(found: Feed) -> None:
    """Read the first items, so that what cannot be fed is said before any work.

    :raises QhubError: naming the item.
    """
    for name, values in found.sample().items():
        if not np.asarray(values).size:
            raise QhubError(f"`{found.dataset.source}` gives an empty `{name}`", hint="check the data")
