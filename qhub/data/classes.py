"""Labels and the classes of a model: names become the model's ids, and ids that it does not have are an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qhub.data.dataset import Dataset
from qhub.errors import QhubError


def label_ids(values: Sequence[str]) -> tuple[list[int], tuple[str, ...] | None]:
    """Ids of labels as they are written: whole numbers are ids already, without names; names are numbered in sorted order."""
    if all(_is_whole(value) for value in values):
        return [int(value) for value in values], None
    names = tuple(sorted(set(values)))
    ids = {name: number for number, name in enumerate(names)}
    return [ids[value] for value in values], names


def sorted_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names in the order of their ids: by number where all are numbers (`2` before `10`), else as text."""
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def fit_labels(dataset: Dataset, classes: int, names: Sequence[str] | None = None) -> Dataset:
    """`dataset` with the label ids of a model with `classes` classes, whose `names` by id are known or not.

    Where all names of the data are names of the model (in any case), its ids are taken; else ids stay as they are.

    :raises QhubError: when a label is not 0 .. classes - 1; it names the first item.
    """
    if dataset.labels is None or dataset.kind == "tokens":
        return dataset
    known = {name.casefold(): number for number, name in enumerate(names or ())}
    own = dataset.class_names
    if own is not None and known and all(name.casefold() in known for name in own):
        ids = np.array([known[name.casefold()] for name in own], dtype=np.int64)
        dataset = replace(dataset, labels=ids[dataset.labels], class_names=tuple(names or ()))
    _check_range(dataset, classes)
    return dataset


def _check_range(dataset: Dataset, classes: int) -> None:
    assert dataset.labels is not None
    wrong = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        what = f"{dataset.where(first)} has the label `{dataset.labels[first]}`; the model has {classes} classes, 0 to {classes - 1}"
        others = f" ({len(wrong)} of {dataset.count} labels are outside)" if len(wrong) > 1 else ""
        raise QhubError(f"{what}{others}", hint="labels count from 0; check that the data belongs to this model")


def _is_whole(value: str) -> bool:
    return value.removeprefix("-").isdecimal()
