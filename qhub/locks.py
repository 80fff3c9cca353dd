"""Locks of files and folders between processes. They end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def hold(path: Path, *, make: bool = False) -> contextlib.ExitStack:
    """Hold the file or folder `path` until what is returned is closed; with `make` it is a file, made if it is missing.

    Where the system (Windows) or the file system has no such locks, nothing is held.

    :raises BlockingIOError: when another process holds it.
    """
    held = contextlib.ExitStack()
    try:
        import fcntl
    except ImportError:
        return held
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY, 0o600)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise
    except OSError:  # a file system without locks
        held.close()
    return held
