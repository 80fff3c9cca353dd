"""What a model weighs at every precision, by class of tensor, and what it needs with its key-value cache: arithmetic on shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from qhub.types import LayerShape, ModelProfile, Scheme

#: Precisions that are shown, by their short names; None: every number has as many bits as the name says.
PRECISIONS: Mapping[str, str | None] = {
    "fp32": None, "fp16": None, "w8": "w8a16", "w4-g128": "w4a16-g128-asym", "w4-g32": "w4a16-g32-asym", "w3-g128": "w3a16-g128-asym",
}  # fmt: skip
_QUANTIZED_KINDS = ("linear", "expert", "conv")
_HALF_BITS = 16


@dataclass(slots=True)
class ClassSize:
    """All tensors of one kind. `bytes` says what they would weigh at each of `PRECISIONS`."""

    kind: str
    tensors: int = 0
    parameters: int = 0
    stored_bytes: int = 0
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PRECISIONS, 0))


@dataclass(frozen=True, slots=True)
class Memory:
    """Weights and cache together, at one precision. `stored` is the precision of the files."""

    precision: str
    weight_bytes: int
    total_bytes: int


def bytes_at(layer: LayerShape, precision: str) -> int:
    """Bytes of one tensor: a matrix with its scales, where groups divide its rows; anything else at 16 bits (fp32: at 32)."""
    name = PRECISIONS[precision]
    count = prod(layer.shape)
    if name is None:
        return count * int(precision.removeprefix("fp")) // 8
    scheme = Scheme.parse(name)
    inner = prod(layer.shape[1:])
    fits = len(layer.shape) > 1 and (scheme.group_size is None or inner % scheme.group_size == 0)
    return round(count * (scheme.bits_per_weight if fits else _HALF_BITS) / 8)


def by_class(model: ModelProfile) -> list[ClassSize]:
    """One entry per kind of tensor, the largest first."""
    rows: dict[str, ClassSize] = {}
    for layer in model.layers:
        row = rows.setdefault(layer.kind, ClassSize(layer.kind))
        row.tensors += 1
        row.parameters += prod(layer.shape)
        row.stored_bytes += layer.bytes
        for precision in PRECISIONS:
            row.bytes[precision] += bytes_at(layer, precision)
    return sorted(rows.values(), key=lambda row: (-row.stored_bytes, -row.parameters, row.kind))


def cache_bytes(model: ModelProfile, context: int) -> int | None:
    """Bytes of the key-value cache of `context` tokens at 16 bits; None where it cannot be told."""
    return None if model.kv_bytes_per_token is None else context * model.kv_bytes_per_token


def memory(model: ModelProfile, context: int) -> list[Memory]:
    """Weights and cache of `context` tokens: as stored, then with the matrices of the blocks at each precision and the rest at 16 bits.

    What a runtime needs besides is not in it. Empty where the weights or the cache are unknown.
    """
    cache = cache_bytes(model, context)
    if cache is None or not model.layers:
        return []
    weights = {"stored": model.weight_bytes} if model.complete else {}
    weights |= {precision: _weight_bytes(model, precision) for precision in PRECISIONS}
    return [Memory(precision, size, size + cache) for precision, size in weights.items()]


def _weight_bytes(model: ModelProfile, precision: str) -> int:
    rest = "fp32" if precision == "fp32" else "fp16"
    return sum(bytes_at(layer, precision if layer.kind in _QUANTIZED_KINDS else rest) for layer in model.weights())


def matrices(model: ModelProfile) -> list[tuple[str, tuple[int, ...], int]]:
    """(name with `*` for numbers, shape, how many) of every matrix and convolution, in the order of the model."""
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for layer in model.layers:
        if len(layer.shape) > 1 and layer.kind != "other":
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), layer.shape)
            found[key] = found.get(key, 0) + 1
    return [(name, shape, count) for (name, shape), count in found.items()]
