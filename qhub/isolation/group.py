"""A command in a process group of its own, watched: its lines are handed on as they come, its time and memory are bounded."""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_POLL_S = 0.1
_LOOK_S = 0.5  # between two looks at the memory: each reads a line of every process on the machine
_GUARD = Path(__file__).with_name("guard.py")
_PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Limits:
    """What a command may take: wall seconds, and resident bytes of all its processes together. None: no bound."""

    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended. `over` says which limit it was ended for: "time", "memory" or None."""

    code: int
    over: str | None
    peak_bytes: int

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that ended it, if one did."""
        number = -self.code if self.code < 0 else self.code - 128
        with contextlib.suppress(ValueError):
            return signal.Signals(number)
        return None


def run_group(command: Sequence[str], on_line: Callable[[str], None], log: Path, limits: Limits | None = None) -> Ended:
    """Run `command`; each line of its stdout goes to `on_line`, its stderr to the end of `log`.

    However this returns or raises (an interruption too), none of the command's processes is left; and none outlives this
    process, however that ends.
    """
    limits = limits or Limits()
    with log.open("ab") as stderr:
        process = _start(command, stderr)
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            over, peak_bytes = _watch(process, lines, on_line, limits)
        finally:
            _kill(process)
            code = process.wait()
            reader.join()
            _close(process)
    for line in _waiting(lines):
        on_line(line)
    return Ended(code, over, peak_bytes)


def _start(command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    guarded = [sys.executable, "-I", "-S", str(_GUARD), *command] if hasattr(os, "killpg") else list(command)
    pipe = subprocess.PIPE
    return subprocess.Popen(guarded, stdin=pipe, stdout=pipe, stderr=stderr, env=surroundings(), start_new_session=True)


def surroundings() -> dict[str, str]:
    """The environment variables without those by which this Python's modules would get into another's."""
    kept = {name: value for name, value in os.environ.items() if name not in _PYTHON_VARIABLES}
    return {**kept, "PYTHONUNBUFFERED": "1"}  # lines are wanted when they are printed


def _watch(
    process: subprocess.Popen[bytes], lines: queue.Queue[str], on_line: Callable[[str], None], limits: Limits
) -> tuple[str | None, int]:
    """Hand on lines until the process ends or is over a limit: which one, and the largest resident memory seen."""
    end = None if limits.seconds is None else time.monotonic() + limits.seconds
    peak_bytes, look = 0, 0.0
    while process.poll() is None:
        time.sleep(_POLL_S)
        for line in _waiting(lines):
            on_line(line)
        if time.monotonic() >= look:
            peak_bytes, look = max(peak_bytes, resident_bytes(process.pid)), time.monotonic() + _LOOK_S
        if limits.memory_bytes is not None and peak_bytes > limits.memory_bytes:
            return "memory", peak_bytes
        if end is not None and time.monotonic() > end:
            return "time", peak_bytes
    return None, peak_bytes


def _waiting(lines: queue.Queue[str]) -> Iterator[str]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield lines.get_nowait()


def _read(stream: IO[bytes], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line.decode("utf-8", "replace").rstrip("\n"))


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill all that is left of the session that `process` leads."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid, _ in _members(process.pid):  # those that made a group of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def resident_bytes(leader: int) -> int:
    """Resident memory of all processes of the session that `leader` leads; memory that they share counts for each.

    0 where the system does not tell (only Linux does).
    """
    return sum(size for _, size in _members(leader))


def _members(leader: int) -> Iterator[tuple[int, int]]:
    """(process id, resident bytes) of each process of a session; source: proc(5)."""
    page = resource.getpagesize()
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
            fields = stat.rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                yield int(name), int(fields[21]) * page
