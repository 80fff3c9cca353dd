"""Which distribution brings the plugin that a person names."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qhub.errors import UsageError

if TYPE_CHECKING:
    from qhub.route.registry import IndexEntry


@dataclass(frozen=True, slots=True)
class Wanted:
    """A plugin to install: its name, its distribution, and what pip is asked for (a distribution, a folder or a wheel).

    `given` is what the user wrote after `install`, so that a hint can repeat it.
    """

    name: str
    distribution: str
    requirement: str
    given: str


def find_wanted(name: str, *, pypi: bool) -> Wanted:
    """A folder, a wheel, or a plugin of the index by its name; with `pypi` also one that the index does not know.

    :raises UsageError: when there is none, or it is not published yet.
    """
    from qhub.plugins import suggest
    from qhub.route.registry import load_registry

    path = Path(name)
    if path.suffix == ".whl" and path.is_file():
        return _of_wheel(path)
    if "/" in name or path.joinpath("pyproject.toml").is_file():
        from qhub.testing.subject import find_subject

        subject = find_subject(path)
        return Wanted(subject.name, subject.distribution, str(path.resolve()), name)
    index = load_registry().index
    if name in index:
        return _of_index(index[name])
    if pypi:
        distribution = f"qhub-{name.removeprefix('qhub-')}"
        return Wanted(name.removeprefix("qhub-"), distribution, distribution, f"{name} --pypi")
    more = f"`qhub plugins install {name} --pypi` takes `qhub-{name}` from the package index, whoever published it; "
    raise UsageError(f"qhub knows no plugin `{name}`", hint=more + suggest(name, index).partition(" (")[0])


def _of_index(entry: IndexEntry) -> Wanted:
    if entry.is_planned or not entry.is_offered:
        what = "planned and not published yet" if entry.is_offered else entry.obstacle
        raise UsageError(f"plugin `{entry.name}` is {what}", hint=f"`qhub plugins search {entry.kinds[0]}` shows what there is")
    beside = Path(__file__).resolve().parents[3] / "plugins" / entry.name
    is_checkout = entry.available == "repository" and (beside / "pyproject.toml").is_file()
    return Wanted(entry.name, entry.distribution, str(beside) if is_checkout else entry.distribution, entry.name)


def _of_wheel(path: Path) -> Wanted:
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
    section = re.search(r"^\[qhub\]\s*\n\s*([\w.-]+)\s*=", "\n".join(texts), flags=re.MULTILINE)
    if section is None:
        raise UsageError(f"`{path}` has no entry point in group `qhub`", hint="a plugin's wheel has one: see `qhub plugins new`")
    return Wanted(section[1], path.name.split("-")[0].replace("_", "-"), str(path.resolve()), str(path))
