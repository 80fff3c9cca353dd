"""A set of labelled examples: what is known of all of them, and single ones read when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qhub.errors import QhubError, UsageError

Kind = Literal["image", "array", "text", "audio", "tokens"]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """One recording: `samples` (T,) float32 in -1 .. 1, channels averaged; `rate` in samples per second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True, slots=True)
class TaggedWords:
    """One sentence in words, with the id of each word's tag (numbers into the dataset's `class_names`)."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


class Reader(Protocol):
    """Where items come from: item `number` of the whole, and how an error calls it."""

    def item(self, number: int) -> Any:  # noqa: ANN401 - an item of the kind
        """Read one item."""

    def where(self, number: int) -> str:
        """The item's place in words: a file, or a line or row of one."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Examples of one kind; items are read when asked for, never all at once.

    `labels` (count,) int64, or None where there are none; `class_names` by label id, where names are known; `sha256` of the file,
    the part of it, or the folder that was read, whatever was chosen from it. `chosen` (count,): the items' numbers in the whole.

    Items by kind: image uint8 (H, W, 3) · array as stored · text `str`, or `(str, str)` for pairs · audio `Sound` · tokens `TaggedWords`.
    """

    source: str
    kind: Kind
    reader: Reader
    chosen: Labels
    sha256: str
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.chosen)

    def items(self, start: int, stop: int) -> list[Any]:
        """The raw items `start` .. `stop` (excluded); fewer at the end.

        :raises QhubError: when an item cannot be read; it names the file or the row.
        """
        return [self.reader.item(int(number)) for number in self.chosen[start:stop]]

    def batches(self, size: int) -> Iterator[tuple[list[Any], Labels | None]]:
        """All items in order, `size` at a time, with their labels."""
        for start in range(0, self.count, size):
            labels = None if self.labels is None else self.labels[start : start + size]
            yield self.items(start, start + size), labels

    def where(self, index: int) -> str:
        """How an error calls item `index`: its file, line or row."""
        return self.reader.where(int(self.chosen[index]))

    def named(self, source: str) -> Dataset:
        """The same data under another name."""
        return replace(self, source=source)

    def choose(self, samples: int, seed: int | None = None) -> Dataset:
        """`samples` of the items, of every label its share; all of them where there are no more.

        The same seed chooses the same items in the same order; without a seed they are the first ones, in order.

        :raises UsageError: when `samples` is not positive.
        """
        if samples < 1:
            raise UsageError(f"`{samples}` samples of `{self.source}` are none", hint="give a number from 1 up")
        order = pick(self.labels, self.count, min(samples, self.count), seed)
        labels = None if self.labels is None else self.labels[order]
        return replace(self, chosen=self.chosen[order], labels=labels)


def checked(dataset: Dataset) -> Dataset:
    """The dataset as it is.

    :raises QhubError: when it has no items, or more or fewer labels than items.
    """
    if not dataset.count:
        raise QhubError(f"`{dataset.source}` holds no data", hint="check the path, or give another one")
    if dataset.labels is not None and len(dataset.labels) != dataset.count:
        raise QhubError(f"`{dataset.source}` has {dataset.count} items and {len(dataset.labels)} labels", hint="write one label per item")
    return dataset


def numbered(count: int) -> Labels:
    """0 .. count - 1: all items of a reader, in order."""
    return np.arange(count, dtype=np.int64)


def pick(labels: Labels | None, count: int, samples: int, seed: int | None) -> Labels:
    """Which `samples` of `count` items: (samples,) int64, of every label a share as large as in the whole.

    Shares are rounded by largest remainder, so that they add up. In the order of a shuffle by `seed`, or in order without one.
    """
    numbers = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(numbers)
    order = np.asarray(numbers, dtype=np.int64)
    if labels is None or samples == count:
        return order[:samples]
    rank = _rank_within_class(labels[order])
    share = shares(labels, samples)
    return order[rank < np.array([share[int(label)] for label in labels[order]])]


def shares(labels: Labels, samples: int) -> dict[int, int]:
    """How many of `samples` items each label gets, in proportion to its count; ties go to the smaller label."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * samples / len(labels)
    given = np.floor(exact).astype(np.int64)
    rest = samples - int(given.sum())
    given[np.argsort(given - exact, kind="stable")[:rest]] += 1
    return {int(label): int(number) for label, number in zip(classes, given, strict=True)}


def _rank_within_class(labels: Labels) -> Labels:
    """For each place, how many earlier places hold the same label."""
    seen: dict[int, int] = {}
    ranks = np.empty(len(labels), dtype=np.int64)
    for place, label in enumerate(labels.tolist()):
        ranks[place] = seen.get(label, 0)
        seen[label] = seen.get(label, 0) + 1
    return ranks
