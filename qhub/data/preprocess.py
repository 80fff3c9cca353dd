"""From raw items to the inputs of a model: the preprocessor that its files describe, and checked batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qhub.data.dataset import Dataset, Kind, Labels
from qhub.data.described import NAMES, common_steps, own_steps, read_mapping
from qhub.data.encode import load_text_steps
from qhub.data.pictures import Inputs, Plain, Where, unplaced
from qhub.data.sounds import load_extractor
from qhub.errors import QhubError, UsageError

Shape = tuple[int | None, ...]  # None: any size


class Preprocessor(Protocol):
    """Raw items of one kind to named arrays, (B, ...) each."""

    def batch(self, items: Sequence[Any], where: Where = unplaced) -> Inputs:
        """The inputs of one batch; `where` names an item in errors."""


@dataclass(frozen=True, slots=True, eq=False)
class ForeignImages:
    """An image processor with steps of its own, run by transformers."""

    processor: Any

    def batch(self, items: Sequence[Any], where: Where = unplaced) -> Inputs:
        """What the processor names, such as `pixel_values` (B, C, H, W)."""
        found = self.processor(images=list(items), return_tensors="np", input_data_format="channels_last")
        return {name: np.asarray(value) for name, value in found.items()}


def find_preprocessor(model: Path, kind: Kind, *, given: Path | None = None, inputs: Sequence[str] = ()) -> Preprocessor:
    """How items of `kind` become inputs of `model`, a folder or a file.

    Taken is the first of: the file that was `given`; `preprocess.json` (or .yaml) beside or in the model; for texts tokenizer.json;
    `preprocessor_config.json`; for arrays nothing. `inputs` are the names that the model takes, where they are known.

    :raises UsageError: when `given` does not exist.
    :raises QhubError: when the model brings nothing for this kind, or what it brings cannot be used.
    """
    folder = model if model.is_dir() else model.parent
    if kind in ("text", "tokens"):
        return load_text_steps(folder, inputs)
    own = _given(given) or next((path for name in NAMES if (path := folder / name).is_file()), None)
    name = inputs[0] if inputs else None
    if own is not None:
        return own_steps(own, read_mapping(own), name or ("pixel_values" if kind == "image" else "x"))
    config = folder / "preprocessor_config.json"
    if config.is_file():
        return load_extractor(folder) if kind == "audio" else _pictures(config, kind, name)
    if kind == "audio":
        hint = 'write preprocess.json there: {"sampling_rate": 16000, "samples": 16000}'
        raise QhubError(f"`{folder}` does not say how it takes sound: it has no preprocessor_config.json", hint=hint)
    return Plain(name or "x")


def model_inputs(
    dataset: Dataset, preprocessor: Preprocessor, size: int, shapes: Mapping[str, Shape] | None = None
) -> Iterator[tuple[Inputs, Labels | None]]:
    """All of `dataset` as inputs, `size` items at a time, with labels; `shapes` (B, ...) are what the model takes, None for any size.

    :raises QhubError: when an input has another shape, or holds NaN or infinity; it names the item.
    """
    for number, (items, labels) in enumerate(dataset.batches(size)):
        start = number * size

        def where(index: int, start: int = start) -> str:
            return dataset.where(start + index)

        inputs = preprocessor.batch(items, where)
        check_shapes(inputs, shapes or {}, where)
        _check_finite(inputs, where)
        yield inputs, labels


def check_shapes(inputs: Inputs, shapes: Mapping[str, Shape], where: Where = unplaced) -> None:
    """Compare what a batch gives with what a model takes; the batch's own size does not count.

    :raises QhubError: at the first difference.
    """
    for name, shape in shapes.items():
        if name not in inputs:
            raise QhubError(f"the model takes `{name}`; the data gives {', '.join(inputs)}", hint='name it in preprocess.json: "input"')
        have, wanted = inputs[name].shape[1:], tuple(shape)[1:]
        if len(have) != len(wanted) or any(size not in (None, found) for size, found in zip(wanted, have, strict=True)):
            raise QhubError(f"{where(0)} gives {_said(have)} for `{name}`; the model takes {_said(wanted)}", hint=_shape_hint(have, wanted))


def _shape_hint(have: tuple[int, ...], wanted: Shape) -> str:
    if len(have) == len(wanted) == 3:
        if sorted(have) == sorted(size or 0 for size in wanted):
            return 'the channels lie elsewhere: set "layout" in preprocess.json to "nchw" or "nhwc"'
        first = wanted[0] in (1, 3)
        height, width = wanted[1:] if first else wanted[:2]
        return f'resize them: set "size": [{height or "height"}, {width or "width"}] in preprocess.json beside the model'
    return "check that the data belongs to this model"


def _said(shape: Shape) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _check_finite(inputs: Inputs, where: Where) -> None:
    for name, value in inputs.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            bad = int(np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(axis=1))[0])
            raise QhubError(
                f"{where(bad)} gives NaN or infinity for `{name}`", hint="check the item, and mean and std of the preprocessing"
            )


def _given(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise UsageError(f"preprocessing file `{path}` does not exist", hint="give a preprocess.json or .yaml")
    return path


def _pictures(config: Path, kind: Kind, name: str | None) -> Preprocessor:
    """The steps of the model's image processor; arrays that it does not describe stay as they are."""
    steps = common_steps(config, read_mapping(config))
    if steps is None:
        return _foreign(config.parent) if kind == "image" else Plain(name or "x")
    return steps if name is None else replace(steps, name=name)


def _foreign(folder: Path) -> ForeignImages:
    try:
        from transformers import AutoImageProcessor
    except ImportError:
        raise QhubError(f"the image processor of `{folder}` needs transformers", hint="pip install 'qhub-core[llm]'") from None
    try:
        return ForeignImages(AutoImageProcessor.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # noqa: BLE001 - what a broken config raises is not defined
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QhubError(f"`{folder}` has no usable image processor ({reason})", hint="get preprocessor_config.json again") from None
