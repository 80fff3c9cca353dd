"""An opened model: logits, generation, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qhub import QhubError
from qhub_native import _native
from qhub_native.load import Loaded, Options, load
from qhub_native.selector import bandwidth


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most probable; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def native(self) -> _native.Sampling:
        """As the binding takes it."""
        made = _native.Sampling()
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            setattr(made, name, getattr(self, name))
        return made


class NativeSession:
    """A QuantizedModel run by the kernels of this plugin."""

    def __init__(self, path: Path, options: Options) -> None:
        self.loaded: Loaded = load(path, options)
        self.config = self.loaded.config
        self.stops = self.config.stops

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V) float32; the B sequences go through together."""
        batch, length = ids.shape
        sequences = [self.sequence(length) for _ in range(batch)]
        flat = self._step(sequences, [self._checked(row) for row in ids], "all")
        return flat.reshape(batch, length, -1)

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """ids (T) → hidden states after the last norm (T, H) float32."""
        return self._step([self.sequence(len(ids))], [self._checked(ids)], "hidden")

    def sequence(self, capacity: int | None = None) -> _native.Sequence:
        """An empty conversation with room for `capacity` tokens (default: the model's context)."""
        wanted = capacity or self.config.context
        if wanted > self.config.context:
            message = f"`{wanted}` tokens do not fit the model's context of {self.config.context}"
            raise QhubError(message, hint="shorten the prompt, or ask for fewer new tokens")
        return self.loaded.decoder.sequence(wanted, 32 if self.loaded.options.exact else self.loaded.options.cache_bits)

    def feed(self, sequence: _native.Sequence, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids` to the conversation; the logits (V) that follow its last token.

        :raises QhubError: when there is no room for them; the conversation is as it was.
        """
        check_room(sequence, len(ids))
        return self._step([sequence], [self._checked(ids)], "last")[0]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until_stop: bool = True,
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Token ids that continue `ids`, one at a time, until a stop token; `sampling` says more than the other words."""
        chosen = sampling or Sampling(temperature=temperature, top_p=top_p, seed=seed)
        sequence = self.sequence(min(self.config.context, len(ids) + max_new_tokens))
        yield from self.reply(sequence, ids, max_new_tokens, chosen, until_stop=until_stop)

    def conversation(self) -> NativeConversation:
        """An empty conversation that keeps keys and values between turns."""
        return NativeConversation(self, self.sequence())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one new token reads: every matrix, of the embedding one row."""
        return self.loaded.bytes_per_token

    @property
    def ops_per_token(self) -> int:
        """Operations of a prompt's token in the products with packed weights; the head is left out, as it sees the last token only."""
        selector = self.loaded.selector
        return sum(2 * key.inputs * key.outputs * len(alike) for key, alike in selector.linears.items() if key != selector.head)

    def peak_ops(self, threads: int) -> float | None:
        """Int8 operations per second that `threads` threads reach with the kernel's instruction alone; None where that is not known."""
        options = self.loaded.options
        return None if options.exact else _native.peak_operations(_native.Pool(threads), options.kernel, 0.2) or None

    @property
    def how_loaded(self) -> str:
        """Whether the weights had to be packed."""
        return "read from the pack cache" if self.loaded.from_cache else "packed"

    def bandwidth(self, threads: int) -> float:
        """Bytes per second that `threads` threads read from memory here; takes half a second."""
        return bandwidth(_native.Pool(threads))

    def reply(
        self, sequence: _native.Sequence, ids: Sequence[int], max_new_tokens: int, sampling: Sampling, *, until_stop: bool = True
    ) -> Iterator[int]:
        """Append `ids` to the conversation and yield what follows; a token is appended when the next one is asked for."""
        settings, random = sampling.native(), _native.Random(sampling.seed)
        seen = [int(token) for token in ids]
        logits = self.feed(sequence, seen)
        for count in range(max_new_tokens):
            token = _native.sample(logits, np.asarray(seen, dtype=np.int32), settings, random)
            if until_stop and token in self.stops:
                return
            yield token
            seen.append(token)
            if count + 1 < max_new_tokens:
                if sequence.length == sequence.capacity:
                    return
                logits = self.feed(sequence, [token])

    def _step(self, sequences: list[_native.Sequence], ids: list[NDArray[np.int32]], wanted: str) -> NDArray[np.float32]:
        if not self.loaded.options.exact:
            rows = sum(map(len, ids))
            self.loaded.selector.prepare(rows, len(ids) if wanted == "last" else rows)  # else the head sees every token
        return np.asarray(self.loaded.decoder.step(sequences, ids, wanted))

    def _checked(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
        tokens = np.asarray(ids)
        if tokens.size == 0:
            raise QhubError("there are no tokens", hint="give a prompt of at least one token")
        if tokens.min() < 0 or tokens.max() >= self.config.vocabulary:
            raise QhubError(f"a token is not in the vocabulary of {self.config.vocabulary}", hint="use the model's own tokenizer")
        return np.ascontiguousarray(tokens, dtype=np.int32)

    def close(self) -> None:
        """Give memory back."""
        del self.loaded


class NativeConversation:
    """A sequence of a session that outlives a reply: what `qhub chat` keeps between turns."""

    #: Tokens that are read together.
    at_once = 256

    def __init__(self, session: NativeSession, sequence: _native.Sequence) -> None:
        self._session, self._sequence = session, sequence

    @property
    def length(self) -> int:
        """How many tokens' keys and values are kept."""
        return int(self._sequence.length)

    @property
    def capacity(self) -> int:
        """How many there is room for: the model's context."""
        return int(self._sequence.capacity)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._sequence.truncate(length)

    def reply(
        self, ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """Append `ids`, some at a time, so that an interruption need not wait for all, and yield what follows, until a stop token.

        :raises QhubError: when there is no room for them; the conversation is as it was.
        """
        check_room(self._sequence, len(ids))
        last = max(0, len(ids) - 1) // self.at_once * self.at_once
        for start in range(0, last, self.at_once):
            self._session.feed(self._sequence, ids[start : start + self.at_once])
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        yield from self._session.reply(self._sequence, ids[last:], max_new_tokens, sampling)


def check_room(sequence: _native.Sequence, count: int) -> None:
    """See that `count` more tokens fit.

    :raises QhubError: when they do not.
    """
    if sequence.length + count > sequence.capacity:
        message = f"`{count}` more tokens do not fit: {sequence.length} of {sequence.capacity} are taken"
        raise QhubError(message, hint="shorten the prompt, or begin anew (`/reset` in a chat)")
