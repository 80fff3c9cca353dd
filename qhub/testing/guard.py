"""What a plugin must not do while it is checked: use the network, write outside its folders, print on stdout.

It sees what Python does (audit events). What native code or another process does, it does not see.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: audit event → which of its arguments is a path that changes.
_CHANGES: Mapping[str, tuple[int, ...]] = {
    "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,),
}  # fmt: skip
_ADDRESSES: Mapping[str, Callable[[Any], object]] = {
    "socket.connect": lambda details: details[1],
    "socket.bind": lambda details: details[1],
    "socket.sendto": lambda details: details[1],
    "socket.sendmsg": lambda details: details[1],
    "socket.getaddrinfo": lambda details: tuple(details[:2]),
    "socket.gethostbyname": lambda details: (details[0], None),
}


@dataclass
class Guard:
    """An audit hook that forbids, and remembers what was tried: check → what."""

    allowed: tuple[str, ...]
    tried: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def install(cls, *folders: Path) -> Guard:
        """Watch this process from now on; it may write below `folders` and to devices."""
        guard = cls(tuple(os.path.realpath(folder) for folder in (*folders, Path("/dev"), Path("/proc"))))
        sys.addaudithook(guard)
        return guard

    def __call__(self, event: str, details: tuple[Any, ...]) -> None:
        """Called by Python for every audit event.

        :raises OSError: for what is forbidden.
        """
        if event in _ADDRESSES:
            self._network(_ADDRESSES[event](details))
        elif event == "open" and isinstance(details[2], int) and details[2] & _WRITING:
            self._write(details[0])
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                self._write(details[index])

    def _network(self, address: object) -> None:
        if not isinstance(address, tuple):  # a socket of this machine's own, by its path
            return
        host, port = address[:2]
        host = host.decode(errors="replace") if isinstance(host, bytes) else host
        where = f"{host}:{port}" if port is not None else str(host)
        self._note("no-network", where)
        raise ConnectionError(f"no network while a plugin is checked: `{where}`")

    def _write(self, path: object) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):  # a file that is already open
            return
        where = os.path.realpath(os.fsdecode(path))
        if any(where == folder or where.startswith(folder + os.sep) for folder in self.allowed):
            return
        if "__pycache__" in where.split(os.sep):  # Python's own
            return
        self._note("no-stray-files", where)
        raise PermissionError(f"a plugin that is checked writes only into its own folders, not `{where}`")

    def _note(self, check: str, what: str) -> None:
        found = self.tried.setdefault(check, [])
        if what not in found:
            found.append(what)
