"""Where the environments of single plugins lie, and what is known of each without starting it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qhub.errors import QhubError, UsageError

LOCK = "lock.json"
DECLARATIONS = "declarations.json"
MARKER = ".partial"  # is there while an environment is being made
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def data_dir() -> Path:
    """Where qhub keeps what outlives a run: `QHUB_DATA_DIR`, else the place that the system has for a user's data."""
    if chosen := os.environ.get("QHUB_DATA_DIR"):
        return Path(chosen).absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qhub"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "qhub"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "qhub"


def environments_dir() -> Path:
    """The folder of all environments, one folder each."""
    return data_dir() / "environments"


@dataclass(frozen=True)
class Lock:
    """What an environment holds: exact versions, of which Python, made when, from what was asked."""

    python: str
    created: str  # ISO 8601, UTC
    asked: tuple[str, ...]  # the requirements as they were given to the installer
    packages: Mapping[str, str]  # distribution → version

    @cached_property
    def digest(self) -> str:
        """sha256 over Python, versions and what was asked: the same environment has the same one, whenever it was made."""
        decisive = [self.python, self.asked_sha256, sorted(self.packages.items())]
        import hashlib

        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    @property
    def asked_sha256(self) -> str:
        """sha256 over the requirements as given."""
        import hashlib

        return hashlib.sha256("\n".join(self.asked).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `lock.json` holds."""
        return {**asdict(self), "asked_sha256": self.asked_sha256, "digest": self.digest}

    @classmethod
    def load(cls, path: Path) -> Lock:
        """Read a lock file.

        :raises QhubError: when it is missing or damaged.
        """
        found = _read(path)
        try:
            return cls(str(found["python"]), str(found["created"]), tuple(found["asked"]), dict(found["packages"]))
        except (KeyError, TypeError, ValueError):
            raise QhubError(f"`{path}` is damaged", hint=f"`{again(path.parent.name)}`") from None


@dataclass(frozen=True)
class Environment:
    """One plugin's environment: a virtual environment with a lock file and what the plugin declares."""

    name: str
    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def is_complete(self) -> bool:
        """Whether it was made to the end."""
        return (self.folder / LOCK).is_file() and not (self.folder / MARKER).exists()

    @cached_property
    def lock(self) -> Lock:
        """What it holds.

        :raises QhubError: when the lock file is missing or damaged.
        """
        return Lock.load(self.folder / LOCK)

    def declarations(self) -> dict[str, Any]:
        """What its plugin said of itself when it was installed; no process is started.

        :raises QhubError: when that is missing, or was said by another installation.
        """
        if not self.python.exists():
            raise QhubError(f"`{self.python}` is gone", hint=f"`{again(self.name)}`")
        found = _read(self.folder / DECLARATIONS)
        if found.get("lock") != self.lock.digest:
            message = f"`{self.folder / DECLARATIONS}` belongs to another installation than `{LOCK}`"
            raise QhubError(message, hint=f"`{again(self.name)}`")
        return found

    @property
    def bytes(self) -> int:
        """What it takes on the disk; a file with several names counts once."""
        found = {(stat.st_dev, stat.st_ino): stat.st_size for path in self.folder.rglob("*") if (stat := path.lstat())}
        return sum(found.values())


def environment(name: str) -> Environment:
    """The environment called `name`, whether it exists or not.

    :raises UsageError: when that cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"`{name}` is no name of a plugin", hint="a name has small letters, digits, `-` and `_`")
    return Environment(name, environments_dir() / name)


def find_environments() -> list[Environment]:
    """All complete environments, by name; none inside one of them, where stages run and plugins are simply installed."""
    folder = environments_dir()
    if not folder.is_dir() or Path(sys.prefix).parent == folder:
        return []
    found = [Environment(path.name, path) for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name)]
    return [one for one in found if one.is_complete]


def locked_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of distributions in environments: each of `names` is `ENVIRONMENT/DISTRIBUTION`; unknown ones are left out."""
    there = {one.name: one for one in find_environments()}
    found = {}
    for name in names:
        owner, _, distribution = name.partition("/")
        version = there[owner].lock.packages.get(distribution) if owner in there else None
        if version is not None:
            found[name] = version
    return found


def again(name: str) -> str:
    """The command that makes an environment anew."""
    return f"qhub plugins uninstall {name} && qhub plugins install {name} --isolated"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QhubError(f"`{path}` is missing", hint=f"`{again(path.parent.name)}`") from None
    except ValueError:
        raise QhubError(f"`{path}` is damaged", hint=f"`{again(path.parent.name)}`") from None
    if not isinstance(found, dict):
        raise QhubError(f"`{path}` is damaged", hint=f"`{again(path.parent.name)}`")
    return found
