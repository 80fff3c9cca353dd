"""A decoder opened by OpenVINO: logits, generation, conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qhub import DecoderConfig, OpenOptions, QhubError, decoder_config, read_json
from qhub_openvino.cache import Cache, run
from qhub_openvino.open import compile_decoder
from qhub_openvino.sampling import drawn
from qhub_openvino.schemes import ENGINE
from qhub_openvino.vendor import ov


class OpenVinoSession:
    """The decoder in `path`, with the threads and the precision that `options` ask for."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        stated = read_json(path / "config.json")
        try:
            self.config: DecoderConfig = decoder_config(stated, ENGINE)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise QhubError(f"`{path}` is damaged: its config.json lacks or garbles {error}", hint="export the model again") from None
        self.compiled: ov.CompiledModel = compile_decoder(path, options)
        self.path = path
        self.stops = _stops(path) or self.config.stops

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V) float32."""
        self._check(ids)
        return run(self.compiled.create_infer_request(), ids.astype(np.int64), 0, last=False).copy()

    def cache(self, capacity: int | None = None) -> Cache:
        """Room for the keys and values of `capacity` tokens (default: the model's context)."""
        wanted = capacity or self.config.context
        if wanted > self.config.context:
            message = f"`{wanted}` tokens do not fit the model's context of {self.config.context}"
            raise QhubError(message, hint="shorten the prompt, or ask for fewer new tokens")
        return Cache(self.compiled, wanted)

    def feed(self, cache: Cache, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids` to the cache; the logits (V) that follow its last token.

        :raises QhubError: when there is no room for them; the cache is as it was.
        """
        tokens = np.array([ids], dtype=np.int64)
        self._check(tokens)
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
        cache: Cache,
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

    def conversation(self) -> OpenVinoConversation:
        """An empty conversation that keeps keys and values between turns."""
        return OpenVinoConversation(self, self.cache())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one new token reads: every matrix, of the embedding one row."""
        from qhub_openvino.read import weight_bytes

        return weight_bytes(self.path)

    def close(self) -> None:
        """Give memory back."""
        del self.compiled

    def _check(self, ids: NDArray[np.int64]) -> None:
        if not ids.size:
            raise QhubError("there are no tokens", hint="give a prompt")
        if ids.min() < 0 or ids.max() >= self.config.vocabulary:
            raise QhubError(f"a token is not in the vocabulary of {self.config.vocabulary}", hint="use the model's own tokenizer")


class OpenVinoConversation:
    """Tokens whose keys and values are kept, so that a turn costs only what is new in it."""

    def __init__(self, session: OpenVinoSession, cache: Cache) -> None:
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


def _stops(path: Path) -> tuple[int, ...]:
    """The stop tokens of generation_config.json, which knows better than config.json."""
    if not (path / "generation_config.json").exists():
        return ()
    stop = read_json(path / "generation_config.json").get("eos_token_id")
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),)
