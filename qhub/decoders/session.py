"""A session with a decoder whose engine steps through a cache: generation, conversations, sampling, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qhub.decoders.config import DecoderConfig, decoder_config
from qhub.decoders.files import read_json
from qhub.errors import QhubError


class DecoderCache(Protocol):
    """The keys and values of one sequence: `length` tokens are kept, there is room for `capacity`."""

    length: int
    capacity: int

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append ids (1, T); the logits (V) after the last of them, valid until the next step.

        :raises QhubError: when there is no room for them; the cache is as it was.
        """

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class DecoderSession:
    """What an engine adds to is `open_cache`, `logits` and `close`; `engine` is its name in errors, `path` the artifact's folder."""

    def __init__(self, path: Path, engine: str) -> None:
        stated = read_json(path / "config.json")
        try:
            self.config: DecoderConfig = decoder_config(stated, engine)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise QhubError(f"`{path}` is damaged: its config.json lacks or garbles {error}", hint="export the model again") from None
        self.path = path
        self.stops = _stops(path) or self.config.stops

    def open_cache(self, capacity: int) -> DecoderCache:
        """An empty cache with room for `capacity` tokens, which the model's context has."""
        raise NotImplementedError

    def cache(self, capacity: int | None = None) -> DecoderCache:
        """Room for the keys and values of `capacity` tokens (default: the model's context)."""
        wanted = capacity or self.config.context
        if wanted > self.config.context:
            message = f"`{wanted}` tokens do not fit the model's context of {self.config.context}"
            raise QhubError(message, hint="shorten the prompt, or ask for fewer new tokens")
        return self.open_cache(wanted)

    def feed(self, cache: DecoderCache, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids` to the cache; the logits (V) that follow its last token.

        :raises QhubError: when there is no room for them; the cache is as it was.
        """
        tokens = np.array([ids], dtype=np.int64)
        self.check(tokens)
        return cache.step(tokens)

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until_stop: bool = True,
    ) -> Iterator[int]:
        """Token ids that continue `ids`, one at a time; greedy at temperature 0."""
        cache = self.cache(min(self.config.context, len(ids) + max_new_tokens))
        random = np.random.default_rng(seed)
        yield from self.reply(cache, ids, max_new_tokens, (temperature, top_p, random), until_stop=until_stop)

    def reply(
        self,
        cache: DecoderCache,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: tuple[float, float, np.random.Generator],
        *,
        until_stop: bool = True,
    ) -> Iterator[int]:
        """Append `ids` and yield what follows, drawn by (temperature, top_p, generator); a token is appended when the next is asked for."""
        logits = self.feed(cache, ids)
        for count in range(max_new_tokens):
            token = drawn(logits, *sampling)
            if until_stop and token in self.stops:
                return
            yield token
            if count + 1 < max_new_tokens:
                logits = self.feed(cache, [token])

    def conversation(self) -> DecoderConversation:
        """An empty conversation that keeps keys and values between turns."""
        return DecoderConversation(self, self.cache())

    def check(self, ids: NDArray[np.int64]) -> None:
        """Refuse tokens that the model does not have.

        :raises QhubError: when there are none, or one is outside the vocabulary.
        """
        if not ids.size:
            raise QhubError("there are no tokens", hint="give a prompt")
        if ids.min() < 0 or ids.max() >= self.config.vocabulary:
            raise QhubError(f"a token is not in the vocabulary of {self.config.vocabulary}", hint="use the model's own tokenizer")


class DecoderConversation:
    """Tokens whose keys and values are kept, so that a turn costs only what is new in it."""

    def __init__(self, session: DecoderSession, cache: DecoderCache) -> None:
        self.session, self.cache = session, cache

    @property
    def length(self) -> int:
        """How many tokens are kept."""
        return self.cache.length

    @property
    def capacity(self) -> int:
        """How many there is room for."""
        return self.cache.capacity

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.cache.truncate(length)

    def reply(
        self, ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """Append `ids` and yield what follows, until a stop token.

        :raises QhubError: when there is no room for `ids`.
        """
        return self.session.reply(self.cache, ids, max_new_tokens, (temperature, top_p, np.random.default_rng(seed)))


def drawn(logits: NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token by its logits (V): the most probable one at temperature 0, else one of those that have `top_p` together."""
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")
    sums = np.cumsum(probabilities[best])
    kept = best[: int(np.searchsorted(sums, top_p)) + 1]
    shares = probabilities[kept] / probabilities[kept].sum()
    return int(random.choice(kept, p=shares))


def _stops(path: Path) -> tuple[int, ...]:
    """The stop tokens of generation_config.json, which knows better than config.json."""
    if not (path / "generation_config.json").exists():
        return ()
    stop = read_json(path / "generation_config.json").get("eos_token_id")
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),)
