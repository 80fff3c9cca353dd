"""Rows of text: `.csv`, `.tsv` and `.jsonl`, with columns found by their names."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qhub.data import digest
from qhub.data.classes import label_ids
from qhub.data.dataset import Dataset, TaggedWords, numbered
from qhub.errors import QhubError

TEXT_COLUMNS = ("text", "sentence", "content", "review", "text_a", "sentence1", "text1", "premise", "question", "query", "title")
SECOND_COLUMNS = ("text_b", "sentence2", "text2", "text_pair", "hypothesis", "passage", "answer")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "sentiment", "intent", "y")
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")
_ENCODING = "utf-8-sig"

Row = tuple[int, Mapping[str, Any]]  # the line it begins on, and its cells by column name


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """Items that were read, each with the line of the file it begins on."""

    path: Path
    values: tuple[Any, ...]
    lines: tuple[int, ...]

    def item(self, number: int) -> Any:  # noqa: ANN401 - a text, a pair of texts, or `TaggedWords`
        """Item `number`."""
        return self.values[number]

    def where(self, number: int) -> str:
        """The item's line in words."""
        return f"line {self.lines[number]} of `{self.path}`"


def read_table(path: Path) -> Dataset:
    """The texts of a file, its labels and class names where it has them; words with tags where it has those.

    :raises QhubError: when there is no text column, or a line is not what the format says; it names the line.
    """
    try:
        rows = list(_json_rows(path) if path.suffix.lower() == ".jsonl" else _cell_rows(path))
    except UnicodeDecodeError as error:
        raise QhubError(f"`{path}` is not UTF-8 text ({error.reason} at byte {error.start})", hint="convert it to UTF-8") from None
    if not rows:
        raise QhubError(f"`{path}` holds no data", hint="check the path, or give another one")
    columns = {str(name).strip().casefold(): name for name in rows[0][1]}
    if words := _first(columns, WORD_COLUMNS):
        return _tagged(path, rows, words, _first(columns, TAG_COLUMNS))
    return _texts(path, rows, columns)


def _texts(path: Path, rows: list[Row], columns: Mapping[str, str]) -> Dataset:
    text, second, label = (_first(columns, names) for names in (TEXT_COLUMNS, SECOND_COLUMNS, LABEL_COLUMNS))
    if text is None:
        hint = f"name the column of the text one of: {', '.join(TEXT_COLUMNS)}"
        raise QhubError(f"`{path}` has no text column; its columns are {', '.join(f'`{name}`' for name in columns.values())}", hint=hint)
    values = [_item(path, row, text, second) for row in rows]
    reader = Lines(path, tuple(values), tuple(line for line, _ in rows))
    every = Dataset(str(path), "text", reader, numbered(len(values)), digest.of_file(path))
    if label is None:
        return every
    ids, names = label_ids([_label(path, row, label) for row in rows])
    return replace(every, labels=np.array(ids, dtype=np.int64), class_names=names)


def _item(path: Path, row: Row, text: str, second: str | None) -> str | tuple[str, str]:
    line, cells = row
    for column in (text, second):
        if column is not None and not isinstance(cells.get(column), str):
            raise QhubError(f"line {line} of `{path}` has no `{column}`", hint="every row needs the same columns")
    return cells[text] if second is None else (cells[text], cells[second])


def _label(path: Path, row: Row, column: str) -> str:
    line, cells = row
    value = cells.get(column)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, str)) and str(value).strip():
        return str(value).strip()
    what = f"line {line} of `{path}` has the {column} `{value}`" if value is not None else f"line {line} of `{path}` has no `{column}`"
    raise QhubError(what, hint="a label is a whole number from 0 up, or a name")


def _tagged(path: Path, rows: list[Row], words: str, tags: str | None) -> Dataset:
    """Sentences in words; every distinct tag is a class."""
    for line, cells in rows:
        found, marks = cells.get(words), cells.get(tags) if tags else []
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise QhubError(f"line {line} of `{path}` has no list of words in `{words}`", hint='write {"tokens": [...], "tags": [...]}')
        if tags and (not isinstance(marks, list) or len(marks) != len(found)):
            count = len(marks) if isinstance(marks, list) else 0
            raise QhubError(f"line {line} of `{path}` has {len(found)} words and {count} tags", hint="write one tag per word")
    flat = [str(tag) for _, cells in rows for tag in (cells[tags] if tags else ())]
    ids, names = label_ids(flat)
    rest = iter(ids)
    values = [TaggedWords(tuple(cells[words]), tuple(next(rest) for _ in (cells[tags] if tags else ()))) for _, cells in rows]
    reader = Lines(path, tuple(values), tuple(line for line, _ in rows))
    return Dataset(str(path), "tokens", reader, numbered(len(values)), digest.of_file(path), class_names=names)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise QhubError(f"line {number} of `{path}` is not JSON", hint="every line of a .jsonl file is one JSON value") from None
            if not isinstance(row, dict):
                raise QhubError(f"line {number} of `{path}` is not a JSON object", hint='write {"text": "...", "label": 0}')
            yield number, row


def _cell_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.csv` (quoted as spreadsheets do) or `.tsv` (no quoting); a file of text and class number may have no header."""
    tabs = path.suffix.lower() == ".tsv"
    with path.open(encoding=_ENCODING, newline="") as file:
        table = csv.reader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        header: list[str] | None = None
        begins = 1
        for cells in _checked(table, path):
            if any(cells):
                if header is None:
                    header = _bare_header(cells)
                    if header is None:
                        header, begins = cells, table.line_num + 1
                        continue
                if len(cells) != len(header):
                    what = f"line {begins} of `{path}` has {len(cells)} cells; the first has {len(header)}"
                    raise QhubError(what, hint="quote cells that hold a comma" if not tabs else "a tab stands between cells only")
                yield begins, dict(zip(header, cells, strict=True))
            begins = table.line_num + 1


def _checked(table: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from table
    except csv.Error as error:
        raise QhubError(f"`{path}` is damaged ({error})", hint="check how it was written") from None


def _bare_header(first: list[str]) -> list[str] | None:
    """Column names for a file without a header, which has two columns: one of them whole numbers. None: `first` is the header."""
    whole = [cell.strip().removeprefix("-").isdecimal() for cell in first]
    if len(first) != 2 or sum(whole) != 1:
        return None
    return ["label", "text"] if whole[0] else ["text", "label"]


def _first(columns: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The column with the first of `names` that there is, as the file writes it."""
    return next((columns[name] for name in names if name in columns), None)
