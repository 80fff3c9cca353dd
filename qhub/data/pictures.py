"""Pictures and arrays to one input of a model: resize, crop, rescale, normalise, in the order of transformers' processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.data import images
from qhub.errors import QhubError

Inputs = dict[str, NDArray[Any]]
Where = Callable[[int], str]  # the place of an item of a batch, for errors


def unplaced(index: int) -> str:
    """How an error calls an item whose place is not known."""
    return f"item {index}"


@dataclass(frozen=True, slots=True)
class Resize:
    """To which (height, width) pictures are brought: exactly `size`, or with their `shortest` side so long and the other `longest` at most.

    `resample` is Pillow's number of the filter.
    """

    size: tuple[int, int] | None = None
    shortest: int | None = None
    longest: int | None = None
    resample: int = 2

    def target(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) for a picture of `shape`."""
        if self.shortest is not None:
            return images.shortest_edge(shape, self.shortest, self.longest)
        assert self.size is not None
        return self.size


@dataclass(frozen=True, slots=True)
class ImageSteps:
    """What is done to a picture, in this order; None and 1.0 leave a step out.

    Values become `(pixels · scale − mean) / std` per channel. Arrays of floats pass as they are, as `name`; other arrays that are no
    pictures are only scaled and normalised, along their last axis, or their first where `layout` is nchw.
    """

    name: str = "pixel_values"
    layout: str = "nchw"
    channels: int | None = 3
    resize: Resize | None = None
    crop: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    reverse_channels: bool = False
    dtype: str = "float32"

    def batch(self, items: Sequence[NDArray[Any]], where: Where = unplaced) -> Inputs:
        """`{name: (B, ...)}`.

        :raises QhubError: when the items do not become one size; it names the first that differs.
        """
        return {self.name: stack([self._one(item) for item in items], where)}

    def _one(self, item: NDArray[Any]) -> NDArray[Any]:
        if np.issubdtype(item.dtype, np.floating):
            return item.astype(np.float32) if item.dtype == np.float64 else item
        if item.dtype != np.uint8 or item.ndim != 3:
            return self._values(item, first=self.layout == "nchw")
        values = self._values(self._pixels(item), first=False)
        return np.ascontiguousarray(values.transpose(2, 0, 1)) if self.layout == "nchw" else values

    def _pixels(self, image: images.Pixels) -> images.Pixels:
        if self.channels is not None:
            image = images.with_channels(image, self.channels)
        if self.resize is not None:
            image = images.resize(image, self.resize.target(image.shape), self.resize.resample)
        if self.crop is not None:
            image = images.center_crop(image, self.crop)
        return image[:, :, ::-1] if self.reverse_channels else image

    def _values(self, raw: NDArray[Any], *, first: bool) -> NDArray[Any]:
        """Scaled and normalised; rounded first as transformers does it, to float32 after the scale."""
        values = (raw.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean or self.std:
            shape = (-1, *[1] * (raw.ndim - 1)) if first and raw.ndim else (-1,)
            mean, std = (np.array(each or (default,), np.float32).reshape(shape) for each, default in ((self.mean, 0.0), (self.std, 1.0)))
            values = (values - mean) / std
        return as_dtype(values, self.dtype)


@dataclass(frozen=True, slots=True)
class Plain:
    """Arrays as they are, in a batch (float64 as float32); pictures are refused: nothing says how the model wants them."""

    name: str = "x"

    def batch(self, items: Sequence[NDArray[Any]], where: Where = unplaced) -> Inputs:
        """`{name: (B, ...)}`.

        :raises QhubError: when an item is a picture of bytes, or shapes differ.
        """
        if items and items[0].dtype == np.uint8:
            message = f"{where(0)} is a picture of bytes, and nothing says how the model wants it"
            hint = 'write preprocess.json beside the model: {"layout": "nchw", "scale": 0.00392157, "mean": [...], "std": [...]}'
            raise QhubError(message, hint=hint)
        return {self.name: stack([item.astype(np.float32) if item.dtype == np.float64 else item for item in items], where)}


def stack(items: Sequence[NDArray[Any]], where: Where) -> NDArray[Any]:
    """Items of one shape as (B, ...).

    :raises QhubError: when one has another shape than the first.
    """
    for index, item in enumerate(items):
        if item.shape != items[0].shape:
            message = f"{where(index)} gives the shape {item.shape}, {where(0)} {items[0].shape}"
            raise QhubError(message, hint='a model takes one size at a time: set "size": [height, width] in preprocess.json')
    return np.stack(items)


def as_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`values` as `dtype`; to whole numbers rounded and kept in range."""
    wanted = np.dtype(dtype)
    if np.issubdtype(wanted, np.integer):
        info = np.iinfo(wanted)
        values = np.clip(np.rint(values), info.min, info.max)
    return values.astype(wanted)
