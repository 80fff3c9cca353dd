"""Small JSON files in the user's cache folder. They may be missing, spoilt or not writable at any time: never an error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_path(name: str) -> Path:
    """Where the file `name` is kept: `$XDG_CACHE_HOME`, or where the system keeps caches."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "qhub" / name
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qhub" / name
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "qhub" / name


def read_cache(name: str) -> dict[str, Any]:
    """The object that the file holds; empty if there is none."""
    try:
        data = json.loads(cache_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def write_cache(name: str, entries: Mapping[str, Any]) -> None:
    """Replace the file in one step; what JSON does not know is written as `str`."""
    path = cache_path(name)
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(entries, default=str) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError:
        return
