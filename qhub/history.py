"""What earlier runs on this machine took, against what was expected of them: it makes the next estimate better.

One JSON object per line in the user's cache folder, the newest last. A run's recipe and its bytes never depend on it; it holds no
names of models or files, and `QHUB_NO_HISTORY=1` neither reads nor writes it. A history that cannot be read or written is no error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qhub.locks import hold
from qhub.route.circumstances import threads
from qhub.route.host import cache_file, cpu_model

SCHEMA = 1
_KEPT, _LOOKED_AT = 500, 8
_MAX_BYTES = 1 << 20
#: A run that measured this many times less or more than was expected was disturbed, or is none of ours.
_PLAUSIBLE = (0.02, 50.0)
_LOCK_TRIES, _LOCK_WAIT_S = 40, 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One figure of one run: `estimated` before anything corrected it, and `measured`, in the same unit.

    For what has no estimate without history (seconds), `estimated` is the amount of work, and measured ÷ estimated is a rate.
    """

    machine: str
    what: str  # "peak_bytes", "seconds", "tokens_per_s"
    key: str  # what must be alike for one run to tell of another: see `key_of`
    estimated: float
    measured: float


@dataclass(frozen=True, slots=True)
class Correction:
    """What to multiply an estimate with, and in words where that comes from."""

    factor: float
    basis: str


def is_enabled() -> bool:
    """Whether the user lets qhub remember what runs took."""
    return os.environ.get("QHUB_NO_HISTORY", "") in ("", "0")


def history_file() -> Path:
    """Where the history is."""
    return cache_file().with_name("history.jsonl")


def machine() -> str:
    """What a figure is a figure of: the processor, and how many threads compute."""
    return f"{cpu_model()} x{threads()}"


def key_of(method: str, scheme: str, engine: str, *counts: int) -> str:
    """A key: runs are alike that share method, scheme, device or runtime, and of each count the power of two below it."""
    return " ".join((method, scheme, engine, *(f"2^{max(count, 1).bit_length() - 1}" for count in counts)))


def correction(entries: Iterable[Entry], where: str, what: str, key: str) -> Correction | None:
    """The median of measured ÷ estimated over the last runs on the machine `where` with this `key`; None if there is none."""
    ratios = [entry.measured / entry.estimated for entry in entries if (entry.machine, entry.what, entry.key) == (where, what, key)]
    recent = ratios[-_LOOKED_AT:]
    if not recent:
        return None
    runs = "1 earlier run" if len(recent) == 1 else f"{len(recent)} earlier runs"
    return Correction(statistics.median(recent), f"{runs} on this machine")


def load(path: Path | None = None) -> tuple[Entry, ...]:
    """What is remembered, oldest first; lines that are none of ours are left out."""
    if not is_enabled():
        return ()
    return tuple(entry for entry in map(_entry, _lines(path or history_file())) if entry is not None)


def record(entries: Sequence[Entry], path: Path | None = None) -> bool:
    """Remember `entries`, and forget the oldest beyond the bound; False where that was not possible or not wanted.

    Entries that are not plausible are left out. Processes that do this at once wait for each other; without locks (Windows) one of two
    that write at once is forgotten.
    """
    new = [entry for entry in entries if _is_plausible(entry)]
    if not new or not is_enabled():
        return False
    path = path or history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path.with_suffix(".lock")):
            known = [line for line in _lines(path) if _entry(line) is not None]
            _replace(path, [*known, *map(_line, new)][-_KEPT:])
    except OSError:
        return False
    return True


def _line(entry: Entry) -> str:
    return json.dumps({"schema": SCHEMA, "time": round(time.time()), **asdict(entry)}, ensure_ascii=False)


def _entry(line: str) -> Entry | None:
    try:
        data: Any = json.loads(line)
        if data["schema"] != SCHEMA:
            return None
        found = Entry(data["machine"], data["what"], data["key"], float(data["estimated"]), float(data["measured"]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return found if all(isinstance(text, str) for text in (found.machine, found.what, found.key)) and _is_plausible(found) else None


def _is_plausible(entry: Entry) -> bool:
    if not (math.isfinite(entry.estimated) and math.isfinite(entry.measured) and entry.estimated > 0 and entry.measured > 0):
        return False
    return entry.what == "seconds" or _PLAUSIBLE[0] <= entry.measured / entry.estimated <= _PLAUSIBLE[1]


def _lines(path: Path) -> list[str]:
    """The lines of the file; of one that something else made huge, those at its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_BYTES))
            text = file.read(_MAX_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()


def _replace(path: Path, lines: Sequence[str]) -> None:
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _held(path: Path) -> contextlib.ExitStack:
    """Hold the lock file `path`; it stays, empty, since removing it would let two processes hold it.

    :raises OSError: when another process does not let go of it.
    """
    for _ in range(_LOCK_TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return hold(path, make=True)
        time.sleep(_LOCK_WAIT_S)
    return hold(path, make=True)
