"""Folders of pictures or recordings: one folder per class, or all in one without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qhub.data import audio, digest, images
from qhub.data.classes import sorted_names
from qhub.data.dataset import Dataset, Kind, numbered
from qhub.errors import QhubError

_KINDS: dict[Kind, frozenset[str]] = {"image": images.SUFFIXES, "audio": audio.SUFFIXES}


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """One item per file."""

    paths: tuple[Path, ...]
    read: Callable[[Path], Any]

    def item(self, number: int) -> Any:  # noqa: ANN401 - a picture or a recording
        """Read one file."""
        return self.read(self.paths[number])

    def where(self, number: int) -> str:
        """The file's path."""
        return f"`{self.paths[number]}`"


def read_folder(folder: Path) -> Dataset:
    """The pictures or recordings of a folder; those in `folder/NAME/` are of class NAME, and names in order are the label ids.

    Files that are neither, and what begins with a dot, are passed over. A class folder without files keeps its id.

    :raises QhubError: when there are none, both kinds, files beside class folders, or only folders of folders.
    """
    loose = _files(folder)
    classes = sorted_names([path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")])
    by_class = {name: _files(folder / name) for name in classes}
    labelled = any(by_class.values())
    if loose and labelled:
        raise QhubError(f"`{folder}` holds `{loose[0].name}` beside class folders", hint="move it into the folder of its class")
    if not loose and not labelled:
        raise _nothing(folder)
    paths = [path for name in classes for path in by_class[name]] if labelled else loose
    kind = _kind(folder, paths)
    reader = Files(tuple(paths), images.read_image if kind == "image" else audio.read_wav)
    sha256 = digest.of_folder(folder, paths)
    if not labelled:
        return Dataset(str(folder), kind, reader, numbered(len(paths)), sha256)
    labels = np.repeat(numbered(len(classes)), [len(by_class[name]) for name in classes])
    return Dataset(str(folder), kind, reader, numbered(len(paths)), sha256, labels, classes)


def _files(folder: Path) -> list[Path]:
    known = frozenset[str]().union(*_KINDS.values())
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in known and path.is_file() and not path.name.startswith("."))


def _kind(folder: Path, paths: Sequence[Path]) -> Kind:
    for kind, suffixes in _KINDS.items():
        others = [path for path in paths if path.suffix.lower() not in suffixes]
        if not others:
            return kind
    first = next(path for path in paths if path.suffix.lower() in audio.SUFFIXES)
    raise QhubError(f"`{folder}` holds images and sounds, such as `{first.name}`", hint="give a folder of one kind")


def _nothing(folder: Path) -> QhubError:
    suffixes = " ".join(sorted(images.SUFFIXES | audio.SUFFIXES))
    deeper = sorted(path for path in folder.iterdir() if path.is_dir() and any(_files(inner) for inner in path.iterdir() if inner.is_dir()))
    if deeper:
        return QhubError(f"`{folder}` holds folders of class folders", hint=f"give one of them: `{deeper[0]}`")
    return QhubError(f"`{folder}` holds no images and no sounds", hint=f"put files into it, or into a folder per class: {suffixes}")
