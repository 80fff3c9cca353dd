"""What shapes of weights are made of: numbers read strictly from a config, and the tensors of one module.

A module's tensors are (name, shape) pairs under the names that its checkpoint uses; matrices are (N, K).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qhub.errors import DamagedModelError

Shapes = Iterator[tuple[str, tuple[int, ...]]]
MAX_SIZE = 1 << 32
MAX_BLOCKS = 4096


class NotDerivable(Exception):
    """The config does not say enough: the shapes are unknown."""


class Config:
    """A model's config, whose numbers are checked when they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def size(self, key: str, default: int | None = None) -> int:
        """The number called `key`.

        :raises NotDerivable: when it is missing and has no default. :raises DamagedModelError: when it is no size.
        """
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise NotDerivable(key)
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
            raise _not_a_size(key, value)
        return value

    def blocks(self, key: str) -> range:
        """The indices of as many blocks as `key` says.

        :raises DamagedModelError: when there are more than any model has.
        """
        count = self.size(key)
        if count > MAX_BLOCKS:
            raise _not_a_size(key, count)
        return range(count)

    def sizes(self, key: str) -> tuple[int, ...]:
        """The list of numbers called `key`.

        :raises NotDerivable: when it is missing. :raises DamagedModelError: when it is no list of sizes.
        """
        value = self.values.get(key)
        if value is None:
            raise NotDerivable(key)
        if not isinstance(value, list) or len(value) > MAX_BLOCKS:
            raise _not_a_size(key, value)
        return tuple(Config({key: item}).size(key) for item in value)

    def flag(self, key: str, *, default: bool) -> bool:
        """The yes or no called `key`; anything else is not a guess: NotDerivable."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise NotDerivable(key)
        return value

    def text(self, key: str, default: str = "") -> str:
        """The string called `key`, or `default`."""
        value = self.values.get(key)
        return value if isinstance(value, str) else default

    def labels(self) -> int:
        """How many classes a classifier tells apart; two where nothing is said, as transformers has it."""
        named = self.values.get("id2label")
        return len(named) if isinstance(named, dict) else self.size("num_labels", 2)

    def head_dim(self, width: int, heads: int, default: int | None = None) -> int:
        """Width of one attention head: `head_dim`, `default`, or the width by the number of heads."""
        if self.values.get("head_dim") is None and default is None:
            if heads == 0 or width % heads:
                raise DamagedModelError(f"`config.json` has `{width}` channels for `{heads}` heads", hint="download it again")
            return width // heads
        return self.size("head_dim", default)


def is_base(architecture: str) -> bool:
    """Whether a class is the model without any head."""
    return architecture.endswith("Model") and "Head" not in architecture


def linear(name: str, out: int, inner: int, *, bias: bool = True) -> Shapes:
    """A matrix (N, K) = (`out`, `inner`), and its bias."""
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def matrices(prefix: str, names: Sequence[str], shape: tuple[int, int], *, bias: bool = True) -> Shapes:
    """Several matrices of one shape (N, K)."""
    for name in names:
        yield from linear(f"{prefix}.{name}", *shape, bias=bias)


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    """A layer norm, or without bias an RMS norm."""
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def norms(prefix: str, names: Sequence[str], width: int, *, bias: bool = True) -> Shapes:
    """Several norms of one width."""
    for name in names:
        yield from norm(f"{prefix}.{name}", width, bias=bias)


def batch_norm(name: str, width: int) -> Shapes:
    """A batch norm with the statistics that it stores."""
    yield from norm(name, width)
    yield f"{name}.running_mean", (width,)
    yield f"{name}.running_var", (width,)
    yield f"{name}.num_batches_tracked", ()


def conv(name: str, shape: tuple[int, ...], *, bias: bool = True) -> Shapes:
    """A convolution of weight `shape` (out, in, …)."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def embedding(name: str, rows: int, width: int) -> Shapes:
    """A table of `rows` vectors."""
    yield f"{name}.weight", (rows, width)


def _not_a_size(key: str, value: object) -> DamagedModelError:
    return DamagedModelError(f"`config.json` says that `{key}` is `{str(value)[:40]}`, which no model has", hint="download it again")
