"""Labels and the classes of a model: names become the model's ids, and ids that it does not have are an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qhub.data.dataset import Dataset, Labels, Reader, TaggedWords
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
    ids = _model_ids(dataset.class_names, names)
    if ids is not None:
        dataset = replace(dataset, class_names=tuple(names or ()))
    if dataset.kind == "tokens":
        return _fit_tags(dataset, classes, ids)
    if dataset.labels is not None and ids is not None:
        dataset = replace(dataset, labels=np.array(ids, dtype=np.int64)[dataset.labels])
    if dataset.labels is not None:
        _check_range(dataset, dataset.labels, classes)
    return dataset


def _model_ids(own: Sequence[str] | None, names: Sequence[str] | None) -> list[int] | None:
    """The model's id of each class of the data; None where not every name is one of the model's."""
    known = {name.casefold(): number for number, name in enumerate(names or ())}
    if own is None or not known or any(name.casefold() not in known for name in own):
        return None
    return [known[name.casefold()] for name in own]


@dataclass(frozen=True, slots=True, eq=False)
class _Retagged:
    """Another reader's sentences with other tag ids."""

    reader: Reader
    ids: Sequence[int]

    def item(self, number: int) -> TaggedWords:
        found: TaggedWords = self.reader.item(number)
        return replace(found, tags=tuple(self.ids[tag] for tag in found.tags))

    def where(self, number: int) -> str:
        return self.reader.where(number)


def _fit_tags(dataset: Dataset, classes: int, ids: Sequence[int] | None) -> Dataset:
    """The same for the tags of words; a sentence counts as outside when one of its tags is."""
    if ids is not None:
        dataset = replace(dataset, reader=_Retagged(dataset.reader, ids))
    tags = [item.tags for items, _ in dataset.batches(1000) for item in items]
    worst = [next((tag for tag in row if not 0 <= tag < classes), 0) for row in tags]
    _check_range(dataset, np.array(worst, dtype=np.int64), classes)
    return dataset


def _check_range(dataset: Dataset, labels: Labels, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        what = f"{dataset.where(first)} has the label `{labels[first]}`; the model has {classes} classes, 0 to {classes - 1}"
        others = f" ({len(wrong)} of {dataset.count} labels are outside)" if len(wrong) > 1 else ""
        raise QhubError(f"{what}{others}", hint="labels count from 0; check that the data belongs to this model")


def _is_whole(value: str) -> bool:
    return value.removeprefix("-").isdecimal()
