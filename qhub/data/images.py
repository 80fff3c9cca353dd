"""One picture: read from a file, resized, cropped. Pillow is imported when a picture is needed, not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.errors import QhubError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
Pixels = NDArray[np.uint8]  # (H, W, C)


def read_image(path: Path) -> Pixels:
    """The picture in a file, (H, W, 3) RGB, turned as its EXIF data says.

    :raises QhubError: when it is no picture, is cut off, or Pillow is not installed.
    """
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        reason = "it is no picture that Pillow reads" if "cannot identify" in str(error) else str(error)
        raise QhubError(f"the image `{path}` cannot be read: {reason}", hint="replace it, or take it out of the folder") from None


def with_channels(image: Pixels, channels: int) -> Pixels:
    """(H, W, `channels`): grey from colour by Pillow's weights, colour from grey by repeating; transparency is dropped."""
    if image.shape[2] == channels:
        return image
    colour = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image[:, :, :3])
    return colour if channels == 3 else np.array(_pillow().fromarray(colour).convert("L"))[:, :, None]


def resize(image: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """`image` at (height, width) `size`; `resample` is Pillow's number (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic)."""
    if image.shape[:2] == size:
        return image
    flat = image[:, :, 0] if image.shape[2] == 1 else image
    resized = np.array(_pillow().fromarray(flat).resize((size[1], size[0]), resample=resample))
    return resized[:, :, None] if resized.ndim == 2 else resized


def shortest_edge(shape: tuple[int, ...], edge: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) of an image of `shape` whose shorter side becomes `edge`, the longer at most `longest`; rounded down."""
    short, long = min(shape[:2]), max(shape[:2])
    new_short, new_long = edge, int(edge * long / short)
    if longest is not None and new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_long, new_short) if shape[0] >= shape[1] else (new_short, new_long)


def center_crop(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of `image`, (height, width) `size`; what lies outside it is black."""
    padded = [max(0, wanted - have) for wanted, have in zip(size, image.shape, strict=False)]
    if any(padded):
        before = [-(-missing // 2) for missing in padded]
        sides = [(first, missing - first) for first, missing in zip(before, padded, strict=True)]
        image = np.pad(image, (*sides, (0, 0)))
    top, left = ((have - wanted) // 2 for have, wanted in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def _pillow() -> Any:  # noqa: ANN401 - the module PIL.Image
    try:
        from PIL import Image
    except ImportError:
        raise QhubError("reading images needs the package `pillow`", hint="pip install 'qhub-core[data]'") from None
    return Image
