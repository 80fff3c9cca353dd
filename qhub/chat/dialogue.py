"""What was said, as messages, as text and as token ids: a reply stays the tokens that were generated, whatever its text encodes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qhub.chat.template import ChatTemplate, find_template
from qhub.chat.tokenizer import TextStream, Tokenizer, read_object
from qhub.errors import UsageError

_CONTEXT = 4  # tokens of a prompt that a text which simply goes on is decoded with


@dataclass(frozen=True)
class Turn:
    """A line of the user with all before it: `text` and `ids` up to where the reply begins."""

    line: str
    text: str
    ids: list[int]


class Language:
    """A model's text side. Without a chat template a reply is what continues the text."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        source = find_template(folder, self.tokenizer.config)
        self.template = None if source is None else ChatTemplate(source, self.tokenizer.named_tokens())
        self.stops = frozenset(self._stops(folder))

    def _stops(self, folder: Path) -> Iterator[int]:
        """The tokens that end a reply: those that its configs name, and the one that the template puts after a reply."""
        for name in ("generation_config.json", "config.json"):
            config = read_object(folder / name)
            text = config.get("text_config")
            for value in (config.get("eos_token_id"), text.get("eos_token_id") if isinstance(text, dict) else None):
                yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
        end = None if self.template is None else self.template.end_of_reply(self.tokenizer.special)
        yield from (token for token in (self.tokenizer.id_of("eos_token"), end) if token is not None)


class Dialogue:
    """The conversation so far."""

    def __init__(self, language: Language, system: str | None = None) -> None:
        self.language = language
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.text = ""
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """The system text from now on; what was said stays.

        :raises UsageError: when the model has no chat template, so that there is no place for it.
        """
        if text and self.language.template is None:
            raise UsageError("the model has no chat template, so there is no system text", hint="begin with it in your own words")
        self.system = text or None

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.messages, self.ids, self.text = [], [], ""

    def ask(self, line: str) -> Turn:
        """The turn that `line` begins. What was said before is as it was generated, as far as the template keeps it as it is."""
        template, tokenizer = self.language.template, self.language.tokenizer
        if template is None:
            added = f"\n{line}" if self.ids else line
            return Turn(line, self.text + added, [*self.ids, *tokenizer.encode(added, begin=not self.ids)])
        text = template.render([*self.all_messages(), {"role": "user", "content": line}])
        if self.text and text.startswith(self.text):
            return Turn(line, text, [*self.ids, *tokenizer.encode(text[len(self.text) :])])
        return Turn(line, text, tokenizer.encode(text))

    def keep(self, turn: Turn, reply: Sequence[int]) -> None:
        """`reply` was generated for `turn`."""
        said = self.language.tokenizer.decode(reply)
        self.messages += [{"role": "user", "content": turn.line}, {"role": "assistant", "content": said}]
        self.ids, self.text = [*turn.ids, *reply], turn.text + said

    def all_messages(self) -> list[dict[str, str]]:
        """The messages, the system text first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def stream(self, turn: Turn) -> TextStream:
        """What turns the reply's tokens into text."""
        context = turn.ids[-_CONTEXT:] if self.language.template is None else ()
        return TextStream(self.language.tokenizer.decode, context)
