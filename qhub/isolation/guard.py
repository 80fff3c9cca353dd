"""Stands between qhub and a command in a process group of its own: whatever happens to qhub, the group ends with it.

Run by its path, with nothing of qhub importable: `python -I -S guard.py COMMAND…`, as the leader of the group. Its standard
input is a pipe whose other end only qhub holds: when that closes (qhub ended, by whatever means), the whole group is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Run `command` and return its exit code, 128 + n when signal n ended it (as shells do)."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_qhub, daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end_with_qhub() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
