"""The demo language model's text: the standard library's own modules, split by hash into three disjoint sets."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Written when Python is built (they name the builder's machine), or tables and prose rather than code.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "pydoc_data/")
TABLE_MARKERS = ("decoding_table", "decoding_map")

MIN_FILE_BYTES = 1_000
# One large module must not be the whole held-out text.
MAX_HELD_OUT_FILE_BYTES = 48_000


@dataclass(frozen=True)
class Module:
    """One source file: its path below the library folder (POSIX separators) and its text."""

    name: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of modules, each sorted by name."""

    training: tuple[Module, ...]
    calibration: tuple[Module, ...]
    heldout: tuple[Module, ...]


def read_modules(library: Path) -> list[Module]:
    """Every module of the library that is code, sorted by name."""
    modules = [_read(path, library) for path in _source_files(library)]
    return sorted((m for m in modules if m is not None), key=lambda m: m.name)


def split(modules: list[Module], *, calibration_bytes: int, heldout_bytes: int) -> Split:
    """Deal the modules in the order of their names' hashes: evaluation first, then calibration, the rest is training.

    The order depends on names only, so a module stays where it is when its text changes.
    """
    small = sorted((m for m in modules if m.size_bytes <= MAX_HELD_OUT_FILE_BYTES), key=_rank)
    heldout = _take(small, heldout_bytes)
    calibration = _take(small[len(heldout) :], calibration_bytes)
    held = {m.name for m in (*heldout, *calibration)}
    training = [m for m in modules if m.name not in held]
    return Split(tuple(training), _by_name(calibration), _by_name(heldout))


def joined(modules: tuple[Module, ...]) -> str:
    """The modules' texts one after the other, as the text files beside the model hold them."""
    return "\n".join(m.text for m in modules)


def _source_files(library: Path) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return found


def _read(path: Path, library: Path) -> Module | None:
    name = path.relative_to(library).as_posix()
    if name.startswith(SKIPPED_PREFIXES):
        return None
    text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
    if len(text) < MIN_FILE_BYTES or any(marker in text for marker in TABLE_MARKERS):
        return None
    return Module(name, text)


def _rank(module: Module) -> str:
    return hashlib.sha256(f"qhub-demo:{module.name}".encode()).hexdigest()


def _take(modules: list[Module], size_bytes: int) -> list[Module]:
    taken: list[Module] = []
    while modules[len(taken) :] and sum(m.size_bytes for m in taken) < size_bytes:
        taken.append(modules[len(taken)])
    return taken


def _by_name(modules: list[Module]) -> tuple[Module, ...]:
    return tuple(sorted(modules, key=lambda m: m.name))
