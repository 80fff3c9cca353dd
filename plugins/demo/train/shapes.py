"""The demo image model's pictures: shapes of random colour, size, place and rotation on uneven grounds, drawn from distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CLASSES = ("bar", "circle", "crescent", "ellipse", "pentagon", "plus", "ring", "square", "star", "triangle")
SIDE = 32
# Pixels are multiples of this: noise in all eight bits would not compress, and the files are shipped.
LEVEL = 17


@dataclass(frozen=True)
class Look:
    """How hard the pictures are to tell apart."""

    radius: tuple[float, float] = (5.0, 10.0)
    contrast: tuple[float, float] = (0.25, 0.9)
    noise: float = 0.07
    slope: float = 0.3
    clutter: int = 3


def draw(count: int, seed: int, look: Look | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` pictures (count, 32, 32, 3) uint8 and their classes, every class as often as the others."""
    look = look or Look()
    random = np.random.RandomState(seed)  # its streams are fixed for good, unlike those of numpy's newer generators
    labels = random.permutation(np.arange(count) % len(CLASSES)).astype(np.int64)
    pixels = np.concatenate([_draw(labels[start : start + 500], random, look) for start in range(0, count, 500)])
    return pixels, labels


def _draw(labels: NDArray[np.int64], random: np.random.RandomState, look: Look) -> NDArray[np.uint8]:
    count = len(labels)
    radius = random.uniform(*look.radius, count)
    inside = np.zeros((count, SIDE, SIDE), np.float32)
    across, down = _turned(count, radius, random)
    for number, name in enumerate(CLASSES):
        of = labels == number
        inside[of] = _coverage(SHAPES[name](across[of], down[of]), radius[of])
    ground, ink = _colours(count, random, look)
    picture = ground + inside[..., None] * ink
    picture += _clutter(count, random, look)
    picture += random.normal(0, look.noise, picture.shape)
    return (np.rint(np.clip(picture, 0, 1) * (255 // LEVEL)) * LEVEL).astype(np.uint8)


def _turned(count: int, radius: Floats, random: np.random.RandomState) -> tuple[Floats, Floats]:
    """Coordinates (count, 32, 32) in which each shape is upright, at the origin, of radius 1."""
    angle = random.uniform(0, 2 * np.pi, count)
    room = np.maximum(0, SIDE / 2 - radius)
    centre = SIDE / 2 - 0.5 + random.uniform(-1, 1, (2, count)) * room
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    y, x = rows - centre[0][:, None, None], columns - centre[1][:, None, None]
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    scale = radius[:, None, None]
    return (x * cosine + y * sine) / scale, (y * cosine - x * sine) / scale


def _coverage(distance: Floats, radius: Floats) -> Floats:
    """Share of each pixel inside, from the distance to the edge in radii (negative inside)."""
    return np.clip(0.5 - distance * radius[:, None, None], 0, 1).astype(np.float32)


def _colours(count: int, random: np.random.RandomState, look: Look) -> tuple[Floats, Floats]:
    """(ground (count, 32, 32, 3), ink (count, 1, 1, 3)): an uneven ground, and what the shape adds to it."""
    base = random.uniform(0.15, 0.85, (count, 1, 1, 3))
    direction = random.uniform(-1, 1, (2, count, 1, 1, 3)) * look.slope / SIDE
    rows, columns = np.mgrid[:SIDE, :SIDE][:, None, :, :, None] - SIDE / 2
    ink = random.normal(size=(count, 1, 1, 3))
    ink *= random.uniform(*look.contrast, (count, 1, 1, 1)) / np.abs(ink).max(axis=3, keepdims=True)
    # away from the ground's colour, where there is room
    ink = np.where(np.abs(base + ink - 0.5) > 0.5, -ink, ink)
    return base + rows * direction[0] + columns * direction[1], ink


def _clutter(count: int, random: np.random.RandomState, look: Look) -> Floats:
    """Small round spots anywhere, (count, 32, 32, 3)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    total = np.zeros((count, SIDE, SIDE, 3), np.float32)
    for _ in range(look.clutter):
        y, x = random.uniform(0, SIDE, (2, count, 1, 1))
        size = random.uniform(0.8, 2.2, (count, 1, 1))
        spot = np.clip(0.5 + size - np.hypot(rows - y, columns - x), 0, 1)
        total += spot[..., None] * random.uniform(-0.5, 0.5, (count, 1, 1, 3))
    return total


def _polygon(corners: int) -> Callable[[Floats, Floats], Floats]:
    """A regular polygon with its corners at radius 1."""

    def distance(x: Floats, y: Floats) -> Floats:
        angles = 2 * np.pi * np.arange(corners) / corners
        sides = np.stack([x * np.cos(angle) + y * np.sin(angle) for angle in angles])
        return sides.max(axis=0) - np.cos(np.pi / corners)

    return distance


def _rectangle(x: Floats, y: Floats, width: float, height: float) -> Floats:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _plus(x: Floats, y: Floats) -> Floats:
    return np.minimum(_rectangle(x, y, 0.95, 0.28), _rectangle(x, y, 0.28, 0.95))


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: the radius of the edge swings between 1 and 0.45 with the angle."""
    swing = np.abs((np.arctan2(y, x) * 5 / (2 * np.pi)) % 1 * 2 - 1)
    return np.hypot(x, y) - (0.45 + 0.55 * swing)


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y))


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "bar": lambda x, y: _rectangle(x, y, 1.0, 0.3),
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "crescent": _crescent,
    "ellipse": lambda x, y: (np.hypot(x, y / 0.62) - 1.0) * 0.62,
    "pentagon": _polygon(5),
    "plus": _plus,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.2,
    "square": _polygon(4),
    "star": _star,
    "triangle": _polygon(3),
}
