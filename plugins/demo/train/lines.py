"""The demo text model's data: single lines of the standard library, and which kind each is: code, comment, docstring or message.

Of comments and docstrings it is the first line; messages are all other strings of several words.
"""

from __future__ import annotations

import ast
import io
import random
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from corpus import Module

KINDS = ("code", "comment", "docstring", "message")
MIN_WORDS, MAX_CHARS = 3, 100
_WORD = re.compile(r"\w{2,}")
# What editors read, and rules drawn with signs.
_NO_PROSE = re.compile(r"(-\*-|coding[:=]|!/|type:|pragma|vim:|noqa|\$Id)|(.)\2{5}")


@dataclass(frozen=True)
class Line:
    """One example: a line without its marks (`#`, quotes) and indentation, and the number of its kind."""

    text: str
    label: int


def labelled(modules: Iterable[Module]) -> list[Line]:
    """Every different line of the modules that is long enough, with its kind; a text that is of two kinds is left out."""
    kinds: dict[str, set[int]] = {}
    for module in modules:
        for kind, text in _of_module(module.text):
            clean = " ".join(text.split())[:MAX_CHARS].strip()
            if len(_WORD.findall(clean)) >= MIN_WORDS and not _NO_PROSE.search(clean):
                kinds.setdefault(clean, set()).add(KINDS.index(kind))
    return [Line(text, *found) for text, found in kinds.items() if len(found) == 1]


def balanced(lines: Iterable[Line], each: int, seed: int) -> list[Line]:
    """At most `each` lines of every kind, chosen and shuffled by the seed."""
    lines = list(lines)
    chosen: list[Line] = []
    dice = random.Random(seed)
    for label in range(len(KINDS)):
        of = [line for line in lines if line.label == label]
        chosen += dice.sample(of, min(each, len(of)))
    dice.shuffle(chosen)
    return chosen


def _of_module(text: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold escapes that Python warns of
            tree = ast.parse(text)
        comments = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT]
    except (SyntaxError, ValueError, tokenize.TokenError):
        return
    strings = _strings(tree)
    lines = {comment.start[0] for comment in comments}
    for comment in comments:
        if comment.start[0] - 1 not in lines:  # what goes on from the line before says less
            yield "comment", comment.string.lstrip("#!")
    for node, documents in strings:
        written = str(node.value).strip()
        yield ("docstring", written.splitlines()[0]) if documents and written else ("message", written)
    yield from (("code", line) for line in _code(text, comments, strings))


def _strings(tree: ast.Module) -> list[tuple[ast.Constant, bool]]:
    """Every string constant, and whether it is a docstring; parts of f-strings are left out."""
    documents, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False):
            documents.add(id(node.body[0].value))  # type: ignore[attr-defined]
        elif isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node, id(node) in documents) for node in constants if id(node) not in parts]


def _code(text: str, comments: list[tokenize.TokenInfo], strings: list[tuple[ast.Constant, bool]]) -> Iterator[str]:
    """Lines without a comment, and outside of strings of several lines."""
    commented = {comment.start[0] for comment in comments}
    inside = {
        number
        for node, documents in strings
        if documents or node.end_lineno != node.lineno
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for number, line in enumerate(text.splitlines(), 1):
        if number not in commented and number not in inside:
            yield line
