"""Attention in the IR: rotary positions, keys and values kept in states, masks of windows, soft caps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qhub import DecoderConfig
from qhub_openvino.norms import rms_norm
from qhub_openvino.vendor import ops, ov

_HIDDEN = np.float32(np.finfo(np.float32).min)  # added to the scores of positions that are not seen


@dataclass(frozen=True)
class Batch:
    """The inputs: ids (B, T), mask (B, positions in all), positions (B, T), beams (B)."""

    ids: ov.Output
    mask: ov.Output
    positions: ov.Output
    beams: ov.Output


class Attention:
    """The attention of every block; `sinks` are the assignments of its states."""

    def __init__(self, config: DecoderConfig, batch: Batch) -> None:
        self.config, self.batch = config, batch
        self.sinks: list[ov.Node] = []
        self._turns = [_turn(frequencies, factor, batch) for frequencies, factor in config.tables]
        self._masks = {window: _mask(batch, window) for window in set(config.windows)}
        rows = ops.gather(ops.shape_of(batch.ids), np.array([0]), 0)
        shape = ops.concat([rows, np.array([config.kv_heads, 0, config.dim])], 0)
        self._nothing = ops.broadcast(np.float32(0), shape)

    def apply(self, block: int, parts: Sequence[ov.Output], norms: Mapping[str, NDArray[np.float32]]) -> ov.Output:
        """parts: query (B, T, heads · D), key and value (B, T, kv heads · D) → (B, T, heads · D)."""
        config = self.config
        query = self._heads(parts[0], config.heads, norms.get("query"))
        key = self._heads(parts[1], config.kv_heads, norms.get("key"))
        turn = self._turns[config.ropes[block]]
        key = self._state(block, "key", _turned(key, turn, config.dim))
        value = self._state(block, "value", self._heads(parts[2], config.kv_heads, None))
        attended = self._attend(block, _turned(query, turn, config.dim), self._shared(key), self._shared(value))
        together = ops.transpose(attended, np.array([0, 2, 1, 3]))
        return ops.reshape(together, np.array([0, 0, config.heads * config.dim]), True).output(0)

    def _heads(self, source: ov.Output, heads: int, norm: NDArray[np.float32] | None) -> ov.Output:
        """(B, T, heads · D) → (B, heads, T, D)."""
        apart = ops.reshape(source, np.array([0, 0, heads, self.config.dim]), True).output(0)
        if norm is not None:
            apart = rms_norm(apart, norm, self.config.eps)
        return ops.transpose(apart, np.array([0, 2, 1, 3])).output(0)

    def _state(self, block: int, part: str, new: ov.Output) -> ov.Output:
        """What is kept of earlier tokens, of the beams that go on, and then `new`."""
        name = f"past_key_values.{block}.{part}present.{block}.{part}"  # as optimum-intel calls them
        shape = [-1, self.config.kv_heads, -1, self.config.dim]
        past = ops.gather(ops.read_value(self._nothing, name, ov.Type.f32, ov.PartialShape(shape)), self.batch.beams, 0)
        kept = ops.concat([past, new], 2)
        self.sinks.append(ops.assign(kept, name))
        return kept.output(0)

    def _shared(self, source: ov.Output) -> ov.Output:
        """Each head of keys or values once for every head of queries that reads it."""
        config, count = self.config, self.config.heads // self.config.kv_heads
        if count == 1:
            return source
        repeated = ops.broadcast(ops.unsqueeze(source, np.array([2])), np.array([1, 1, count, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(repeated, np.array([0, config.heads, -1, config.dim]), True).output(0)

    def _attend(self, block: int, query: ov.Output, key: ov.Output, value: ov.Output) -> ov.Output:
        config, mask = self.config, self._masks[self.config.windows[block]]
        scale = np.float32(config.attention_scale)
        cap = np.float32(config.attention_softcap)
        if not cap:
            own = not math.isclose(config.attention_scale, config.dim**-0.5, rel_tol=1e-7)
            return ops.scaled_dot_product_attention(query, key, value, mask, *((ops.constant(scale),) if own else ())).output(0)
        scores = ops.multiply(ops.matmul(query, key, False, True), scale)
        scores = ops.multiply(ops.tanh(ops.divide(scores, cap)), cap)
        return ops.matmul(ops.softmax(ops.add(scores, mask), -1), value, False, False).output(0)


_Turn = tuple[ov.Output, ov.Output]


def _turn(frequencies: NDArray[np.float32], factor: float, batch: Batch) -> _Turn:
    """Cosines and sines (B, 1, T, turned) of the positions; frequencies (turned / 2)."""
    places = ops.convert(ops.unsqueeze(batch.positions, np.array([1])), "f32")  # (B, 1, T)
    angles = ops.transpose(ops.matmul(ops.constant(frequencies.reshape(1, -1, 1)), places, False, False), np.array([0, 2, 1]))
    both = ops.concat([angles, angles], -1)
    return _unit(ops.cos(both), factor), _unit(ops.sin(both), factor)


def _unit(values: ov.Node, factor: float) -> ov.Output:
    scaled = values if factor == 1.0 else ops.multiply(values, np.float32(factor))
    return ops.unsqueeze(scaled, np.array([1])).output(0)


def _turned(source: ov.Output, turn: _Turn, dim: int) -> ov.Output:
    """Heads (B, H, T, D), their first `turned` numbers turned by their positions."""
    turned = turn[0].partial_shape[3].get_length()
    if turned == dim:
        return _rotated(source, turn, turned)
    first, rest = ops.variadic_split(source, -1, np.array([turned, dim - turned])).outputs()
    return ops.concat([_rotated(first, turn, turned), rest], -1).output(0)


def _rotated(source: ov.Output, turn: _Turn, turned: int) -> ov.Output:
    one, axis, half = np.array([1]), np.array([3]), np.array([turned // 2])
    left = ops.slice(source, np.array([0]), half, one, axis)
    right = ops.slice(source, half, np.array([np.iinfo(np.int64).max]), one, axis)
    swapped = ops.concat([ops.multiply(right, np.float32(-1)), left], -1)
    return ops.add(ops.multiply(source, turn[0]), ops.multiply(swapped, turn[1])).output(0)


def _mask(batch: Batch, window: int) -> ov.Output:
    """(B, 1, T, positions in all): 0 where a token sees a position, else what hides it; window 0 sees all before."""
    total = ops.gather(ops.shape_of(batch.mask), 1, 0)
    length = ops.gather(ops.shape_of(batch.ids), 1, 0)
    keys = ops.range(0, total, 1, "i64")
    queries = ops.unsqueeze(ops.range(ops.subtract(total, length), total, 1, "i64"), np.array([1]))
    seen = ops.less_equal(keys, queries)
    if window:
        seen = ops.logical_and(seen, ops.greater(keys, ops.subtract(queries, np.int64(window))))
    given = ops.unsqueeze(ops.not_equal(batch.mask, np.int64(0)), np.array([1, 2]))
    return ops.select(ops.logical_and(seen, given), np.float32(0), _HIDDEN).output(0)
