"""Texts to ids, by the `tokenizers` package alone: padded to the longest of a batch, cut at the model's limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.data.dataset import TaggedWords
from qhub.data.described import read_mapping
from qhub.data.pictures import Inputs, Where, unplaced
from qhub.errors import QhubError

IGNORED = -100  # the label of a token that none is asked for
_NO_LIMIT = 1 << 20  # transformers writes 10**30 for "none"
_OFFSET = frozenset(
    {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl"}
)  # positions begin after the padding id
_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, slots=True, eq=False)
class TextSteps:
    """`tokenizer.json` of a model folder with its limit; `names` are the inputs that the model takes, in int64."""

    tokens: Any
    names: tuple[str, ...] = _NAMES
    limit: int | None = None

    def batch(self, items: Sequence[Any], where: Where = unplaced) -> Inputs:
        """`{name: (B, T)}` int64; T is the longest of the batch after cutting."""
        encoded = self._encode(items)
        columns = {
            "input_ids": [one.ids for one in encoded],
            "attention_mask": [one.attention_mask for one in encoded],
            "token_type_ids": [one.type_ids for one in encoded],
        }
        return {name: np.asarray(columns[name], dtype=np.int64) for name in self.names}

    def word_labels(self, items: Sequence[TaggedWords]) -> NDArray[np.int64]:
        """(B, T) int64: each word's tag at its first token, `IGNORED` at all others, aligned with `batch` of the same items."""
        rows = [_word_row(one.word_ids, item.tags) for one, item in zip(self._encode(items), items, strict=True)]
        return np.asarray(rows, dtype=np.int64)

    def _encode(self, items: Sequence[Any]) -> list[Any]:
        if items and isinstance(items[0], TaggedWords):
            return list(self.tokens.encode_batch([list(item.words) for item in items], is_pretokenized=True))
        return list(self.tokens.encode_batch(list(items)))


def load_text_steps(folder: Path, inputs: Sequence[str] = ()) -> TextSteps:
    """The tokenizer of a model folder; `inputs` are the names that the model takes, where they are known.

    :raises QhubError: when there is no usable tokenizer.json, `tokenizers` is missing, or an input is none that a tokenizer gives.
    """
    config, settings = _optional(folder / "config.json"), _optional(folder / "tokenizer_config.json")
    tokens = _read(folder)
    limit = _limit(config, settings, tokens)
    if limit is not None:
        tokens.enable_truncation(max_length=limit)
    text, number = _padding(tokens, config, settings)
    side = "left" if settings.get("padding_side") == "left" else "right"
    tokens.enable_padding(pad_id=number, pad_token=text, direction=side)
    return TextSteps(tokens, _names(folder, config, settings, inputs), limit)


def _read(folder: Path) -> Any:  # noqa: ANN401 - a tokenizers.Tokenizer
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "get the tokenizer's files again; an older one is converted by `AutoTokenizer.from_pretrained(…).save_pretrained(DIR)`"
        raise QhubError(f"`{folder}` has no tokenizer.json, which texts need", hint=hint)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise QhubError("reading texts needs the package `tokenizers`", hint="pip install 'qhub-core[data]'") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises plain Exception
        raise QhubError(f"`{path}` is not a tokenizer ({str(error).splitlines()[0]})", hint="get the tokenizer's files again") from None


def _names(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], inputs: Sequence[str]) -> tuple[str, ...]:
    """The inputs that the model takes; a tokenizer gives type ids only to models that have types."""
    if inputs:
        unknown = [name for name in inputs if name not in _NAMES]
        if unknown:
            message = f"the model takes `{unknown[0]}`, which no tokenizer gives ({', '.join(_NAMES)})"
            raise QhubError(message, hint=f"check that `{folder}` belongs to the model")
        return tuple(inputs)
    listed = settings.get("model_input_names")
    if isinstance(listed, list):
        return tuple(name for name in _NAMES if name in listed)
    return _NAMES if int(config.get("type_vocab_size") or 0) > 1 else _NAMES[:2]


def _limit(config: Mapping[str, Any], settings: Mapping[str, Any], tokens: Any) -> int | None:  # noqa: ANN401
    """Most tokens of one text: the smallest of what tokenizer and model say."""
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and config.get("model_type") in _OFFSET:
        positions -= int(config.get("pad_token_id") or 0) + 1
    own = (tokens.truncation or {}).get("max_length")
    found = [int(limit) for limit in (settings.get("model_max_length"), positions, own) if isinstance(limit, (int, float))]
    known = [limit for limit in found if 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def _padding(tokens: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, int]:  # noqa: ANN401
    """(text, id) of the padding token; id 0 where there is none: the attention mask hides it."""
    token = settings.get("pad_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    number = tokens.token_to_id(text) if isinstance(text, str) else config.get("pad_token_id")
    number = number if isinstance(number, int) and number >= 0 else 0
    return str(tokens.id_to_token(number) or ""), number


def _optional(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _word_row(word_ids: Iterable[int | None], tags: Sequence[int]) -> list[int]:
    row: list[int] = []
    last: int | None = None
    for word in word_ids:
        row.append(tags[word] if word is not None and word != last and tags else IGNORED)
        last = word
    return row
