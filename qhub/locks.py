"""Locks of files and folders between processes. They end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def hold(path: Path) -> contextlib.ExitStack:
    """Hold the folder or file `path` (a file that is missing is made) until what is returned is closed.

    Where the system (Windows) or the file system has no such locks, nothing is held.

    :raises BlockingIOError: when another process holds it.
    """
    held = contextlib.ExitStack()
    try:
        import fcntl
    except ImportError:
        return held
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o600)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise
    except OSError:  # a file system without locks
        held.close()
    return held
