"""What a run says while it works: one JSON object per event, to `events.jsonl` and to whoever listens."""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Events:
    """Writes events to `file` (appending) and hands each to `listener`.

    Kinds: `stage` (name, state start|end, seconds, peak_rss_bytes) · `block` (stage, index from 1, count, name, error,
    seconds_left, rss_bytes) · `note` and `warning` (text).
    """

    file: Path | None = None
    listener: Listener | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    def emit(self, kind: str, **facts: Any) -> None:  # noqa: ANN401 - JSON values
        """Record one event now."""
        event = {"time": round(time.time(), 3), "event": kind, **facts}
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")
        if self.listener is not None:
            self.listener(event)

    def relay(self, event: dict[str, Any]) -> None:
        """Hand on an event that another process has written to the file."""
        if self.listener is not None:
            self.listener(event)

    def note(self, text: str) -> None:
        """Something the user may like to know."""
        self.emit("note", text=text)

    def warning(self, text: str) -> None:
        """Something the user should know; it also ends up in the report."""
        self.emit("warning", text=text)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage; its seconds and the process's peak memory so far go into the report."""
        started = time.perf_counter()
        self.emit("stage", name=name, state="start")
        yield
        facts = {"name": name, "seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
        self.stages.append(facts)
        self.emit("stage", state="end", **facts)


@dataclass
class Progress:
    """Counts blocks of one stage and estimates the time left from the ones done in this process."""

    events: Events
    stage: str
    count: int
    started: float = field(default_factory=time.perf_counter)
    done_here: int = 0

    def block(self, index: int, name: str, *, error: float | None = None) -> None:
        """Block `index` (from 0) is finished; `error` is its relative squared output error."""
        self.done_here += 1
        left = (self.count - index - 1) * (time.perf_counter() - self.started) / self.done_here
        facts = {"index": index + 1, "count": self.count, "name": name, "error": error}
        self.events.emit("block", stage=self.stage, **facts, seconds_left=round(left, 1), rss_bytes=rss_bytes())


def give_back_memory() -> None:
    """Return what was freed to the system; glibc keeps what lies between blocks of memory that are still in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident memory of this process now (its peak where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return peak_rss_bytes()
    return pages * resource.getpagesize()
