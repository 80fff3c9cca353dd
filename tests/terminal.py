"""A command in a terminal of its own (a pseudo-terminal): what is typed, what is seen, and how it ended."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_LONGEST_S = 120.0  # on a machine that is busy with other things
#: Makes the terminal its own before the command begins, so that Ctrl-C reaches it.
_OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """`python -m qhub …` with a keyboard and a screen. Use it in a `with`."""

    def __init__(self, arguments: Sequence[object], folder: Path, env: Mapping[str, str]) -> None:
        self.seen = ""
        self._screen, inner = pty.openpty()
        command = [sys.executable, "-c", _OWN, "-m", "qhub", *map(str, arguments)]
        variables = {**os.environ, "TERM": "dumb", "COLUMNS": "200", **env}
        self.process = subprocess.Popen(command, cwd=folder, env=variables, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def type(self, text: str) -> None:
        """Press the keys of `text`; a line ends with `\\r`."""
        os.write(self._screen, text.encode())

    def wait_for(self, text: str) -> str:
        """What is seen up to and with `text`, from where the last look ended."""
        stop = time.monotonic() + _LONGEST_S
        while text not in self.seen:
            assert self._read(stop), f"`{text}` did not come; there is:\n{self.seen}"
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def insist(self, key: str, text: str) -> str:
        """Press `key` until `text` is seen, as a person would: a signal just before readline listens is noticed with the next key."""
        stop = time.monotonic() + _LONGEST_S
        while text not in self.seen:
            assert time.monotonic() < stop, f"`{text}` did not come; there is:\n{self.seen}"
            self.type(key)
            patience = time.monotonic() + 5
            while text not in self.seen and self._read(patience):
                pass
        return self.wait_for(text)

    def end(self) -> tuple[int, str]:
        """The exit code, once it has ended, and what was seen until then."""
        stop = time.monotonic() + _LONGEST_S
        while self._read(stop):
            pass
        return self.process.wait(timeout=_LONGEST_S), self.seen

    def _read(self, stop: float) -> bool:
        ready, _, _ = select.select([self._screen], [], [], max(0.0, stop - time.monotonic()))
        try:
            text = os.read(self._screen, 65536) if ready else b""
        except OSError:  # Linux says so when the other side is closed
            text = b""
        self.seen += text.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(text)
