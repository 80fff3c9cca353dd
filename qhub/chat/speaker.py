"""Replies of a session. What it keeps of the tokens before is used again as far as they are still the same."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from qhub.interfaces import Conversation, Session


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn (see `Session.generate`), and how many at most for one reply."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int


class Speaker:
    """A session that answers one turn after the other."""

    def __init__(self, session: Session, sampling: Sampling) -> None:
        self.session, self.sampling = session, sampling
        make = getattr(session, "conversation", None)
        self.conversation: Conversation | None = None if make is None else make()
        self._kept: list[int] = []
        self._turns = 0

    def room(self, context: int | None) -> int | None:
        """How many tokens a conversation may have, where the model's config says `context`; None: nobody knows a limit."""
        if self.conversation is None:
            return context
        return self.conversation.capacity if context is None else min(context, self.conversation.capacity)

    def reply(self, ids: Sequence[int], room: int) -> Generator[int, None, None]:
        """At most `room` tokens that follow `ids`, up to the model's stop token. May be left at any token."""
        chosen, count = self.sampling, min(self.sampling.max_tokens, room)
        seed = chosen.seed + self._turns
        self._turns += 1
        if self.conversation is None:
            yield from self.session.generate(ids, count, temperature=chosen.temperature, top_p=chosen.top_p, seed=seed)
            return
        known = min(shared(self._kept, ids), len(ids) - 1)  # something has to be read for a token to follow
        self.conversation.truncate(known)
        tokens = list(ids)
        try:
            for token in self.conversation.reply(ids[known:], count, temperature=chosen.temperature, top_p=chosen.top_p, seed=seed):
                tokens.append(token)
                yield token
        finally:
            self._kept = tokens[: self.conversation.length]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((index for index, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs), min(len(one), len(other)))
