"""A model's tokenizer, by the `tokenizers` package alone, and text from tokens as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qhub.errors import QhubError

_UNFINISHED = "\ufffd"  # what half a character is decoded to
_WINDOW, _KEPT = 32, 4  # tokens decoded together while a text streams, and those that the next window begins with


class Tokenizer:
    """`tokenizer.json` of a model folder, with what `tokenizer_config.json` adds."""

    def __init__(self, folder: Path) -> None:
        self._tokens = _read(folder)
        self.config = {**read_object(folder / "special_tokens_map.json"), **read_object(folder / "tokenizer_config.json")}
        self.special = {token.content: number for number, token in self._tokens.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """The ids of `text`; with `begin` as a text of its own begins, which for many models is a token that says so."""
        ids: list[int] = self._tokens.encode(text, add_special_tokens=begin).ids
        first, last = self.id_of("bos_token"), self.id_of("eos_token")
        if begin and ids and ids[-1] == last:
            ids = ids[:-1]
        missing = begin and self.config.get("add_bos_token") is True and first is not None and ids[:1] != [first]
        return [first, *ids] if missing and first is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out; half a character becomes U+FFFD."""
        return str(self._tokens.decode(list(ids), skip_special_tokens=True))

    def named_tokens(self) -> dict[str, str]:
        """The texts of the special tokens by the names that chat templates use: `bos_token`, `eos_token`, …"""
        texts = {name: _content(value) for name, value in self.config.items() if name.endswith("_token")}
        return {name: text for name, text in texts.items() if text is not None}

    def id_of(self, name: str) -> int | None:
        """The id of the special token with that name; None if there is none."""
        text = _content(self.config.get(name))
        found: int | None = None if text is None else self._tokens.token_to_id(text)
        return found


class TextStream:
    """Text from tokens one at a time, never half a character. `context` are the tokens before the first one, if their text goes on."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context)
        self._shown = len(decode(self._ids)) if self._ids else 0

    def push(self, token: int) -> str:
        """What can be shown now that `token` is known."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = len(text.rstrip(_UNFINISHED))
        piece = text[self._shown : whole]
        self._shown = max(self._shown, whole)
        if whole == len(text) and len(self._ids) > _WINDOW:
            self._ids = self._ids[-_KEPT:]
            self._shown = len(self._decode(self._ids))
        return piece

    def rest(self) -> str:
        """What was held back because it looked unfinished, at the end."""
        text = self._decode(self._ids) if self._ids else ""
        piece, self._shown = text[self._shown :], len(text)
        return piece


class Until:
    """Text up to the first of the stop texts, which itself is not shown; `ended` once one has come."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.ended = False
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""  # what a stop text may begin with

    def push(self, piece: str) -> str:
        """What can be shown now that the text goes on with `piece`."""
        text = "" if self.ended else self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        held = max((count for stop in self._stops for count in range(1, len(stop)) if text.endswith(stop[:count])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._held


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file.

    :raises QhubError: when the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise QhubError(f"`{path}` is not JSON: {error}", hint="get the tokenizer's files again") from None
    if not isinstance(value, dict):
        raise QhubError(f"`{path}` holds `{type(value).__name__}` where a JSON object is expected", hint="get the tokenizer's files again")
    return value


def _read(folder: Path) -> Any:  # noqa: ANN401 - a tokenizers.Tokenizer
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "get the tokenizer's files again; an older one is converted by `AutoTokenizer.from_pretrained(…).save_pretrained(DIR)`"
        raise QhubError(f"`{folder}` has no tokenizer.json", hint=hint)
    try:
        from tokenizers import Tokenizer as Tokens
    except ImportError:
        raise QhubError("a chat needs the package `tokenizers`", hint="pip install 'qhub-core[chat]'") from None
    try:
        found = Tokens.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises plain Exception
        raise QhubError(f"`{path}` is not a tokenizer ({str(error).splitlines()[0]})", hint="get the tokenizer's files again") from None
    found.no_truncation()
    found.no_padding()
    return found


def _content(token: object) -> str | None:
    """The text of a special token, which files hold plain or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
