"""What a person sees: tables and JSON on stdout; progress, warnings and errors on stderr. The only user of rich.

rich is imported only to draw a table on a terminal; in a pipe a table is plain aligned text.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from qhub.units import human_bytes, human_seconds

_COLOURS = {"error": "31;1", "warning": "33", "hint": "36"}


@dataclass
class Output:
    """Writes to stdout and stderr so that a live progress line and other text never mix."""

    _live: bool = False
    _shown: set[str] = field(default_factory=set)
    _stage: str = ""

    def json(self, value: Any) -> None:  # noqa: ANN401 - any value of qhub.types
        """One JSON document on stdout; numbers that JSON does not have (inf, nan) become null."""
        from qhub.types import as_json

        self._clear()
        print(json.dumps(_finite(as_json(value)), indent=2, ensure_ascii=False, allow_nan=False))

    def print(self, text: str = "") -> None:
        """Data that is text, on stdout."""
        self._clear()
        print(text)

    def stream(self, text: str) -> None:
        """A piece of data on stdout as it comes: seen at once, no line of its own."""
        self._clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
        """A table on stdout. `right` names the columns to align right; a row of one cell is a heading within the table."""
        self._clear()
        if not sys.stdout.isatty():
            print("\n".join(_plain_table(columns, rows, title, right)))
            return
        _rich_table(columns, rows, title, right)

    def text(self, text: str) -> None:
        """What a person may like to know, on stderr."""
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """`warning: …` on stderr; the same text only once."""
        if text not in self._shown:
            self._shown.add(text)
            self.text(f"{_paint('warning')}: {text}")

    def error(self, message: str, hint: str | None) -> None:
        """`error: …`, a blank line, `hint: …` on stderr."""
        self.text(f"{_paint('error')}: {message}" + (f"\n\n{_paint('hint')}: {hint}" if hint else ""))

    def progress(self, event: Mapping[str, Any]) -> None:
        """A listener for `qhub.events.Events`: one live line on a terminal, a plain line per stage or block in a pipe."""
        kind = event["event"]
        if kind == "warning":
            self.warning(str(event["text"]))
        elif kind == "note":
            self.text(str(event["text"]))
        elif kind in ("stage", "block"):
            self._advance(progress_line(event), lasting=kind == "stage" and event["state"] == "end")

    def _advance(self, line: str, *, lasting: bool) -> None:
        if lasting or not _is_terminal(sys.stderr):
            self.text(line)
            return
        from shutil import get_terminal_size  # costs a tenth of the start-up, and most commands have no live line

        width = get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{line[:width]}")
        sys.stderr.flush()
        self._live = True

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._live = False


def progress_line(event: Mapping[str, Any]) -> str:
    """An event in words, e.g. `quantize  block 3/22  error 0.0012  12 s left  1.2 GB`."""
    if event["event"] == "block":
        parts = [event["stage"], f"block {event['index']}/{event['count']}"]
        if event.get("error") is not None:
            parts.append(f"error {event['error']:.2g}")
        return "  ".join([*parts, f"{human_seconds(event['seconds_left'])} left", human_bytes(event["rss_bytes"])])
    if event["state"] == "start":
        return f"{event['name']}  …"
    return f"{event['name']}  {human_seconds(event['seconds'])}  peak {human_bytes(event['peak_rss_bytes'])}"


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON in, JSON out
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _paint(word: str) -> str:
    coloured = _is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    return f"\x1b[{_COLOURS[word]}m{word}\x1b[0m" if coloured else word


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Sequence[str]) -> list[str]:
    grid = [columns, *(row for row in rows if len(row) > 1)]
    widths = [max(len(row[index]) for row in grid) for index in range(len(columns))]
    lines = [title, ""] if title else []
    for row in [columns, *rows]:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width) for cell, width, column in zip(row, widths, columns, strict=False)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style="bold" if len(row) == 1 else None)
    Console().print(table)
