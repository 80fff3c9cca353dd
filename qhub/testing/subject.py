"""The plugin under test: an installed one by name, or a folder whose pyproject.toml says where the plugin is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qhub.errors import UsageError
from qhub.plugins import GROUP, suggest

_NAME = re.compile(r"""^name\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_SECTION = re.compile(rf"""^\[project\.entry-points\.["']?{GROUP}["']?\]\s*$(.*?)(?=^\[|\Z)""", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"""^["']?([\w.-]+)["']?\s*=\s*["']([^"']+)["']""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Subject:
    """A plugin: its entry point, and for one in a folder where its modules are (`source`)."""

    name: str
    distribution: str
    module: str
    source: Path | None = None

    def environment(self, work: Path) -> dict[str, str]:
        """The variables in which a new process finds this plugin and no other; writes what it needs into `work`."""
        paths = [str(work / "metadata"), str(self.source)] if self.source is not None else []
        if self.source is not None:
            self._write_metadata(work / "metadata" / f"{self.distribution.replace('-', '_')}-0.dist-info")
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        found = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *inherited]), "QHUB_PLUGINS": self.name}
        found.pop("QHUB_DISABLED_PLUGINS", None)
        return found

    def _write_metadata(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        about = f"Metadata-Version: 2.1\nName: {self.distribution}\nVersion: 0\n"
        (folder / "METADATA").write_text(about, encoding="utf-8")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{self.name} = {self.module}\n", encoding="utf-8")


def find_subject(plugin: str | Path) -> Subject:
    """The plugin called `plugin`, or the one in the folder of that path (anything with a separator, or a `Path`).

    :raises UsageError: when there is none.
    """
    if isinstance(plugin, Path) or os.sep in plugin or plugin == ".":
        return _in_folder(Path(plugin))
    installed = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if plugin not in installed:
        near = f"`qhub plugins check ./{plugin}` checks the folder of that name; " if Path(plugin).is_dir() else ""
        raise UsageError(f"no plugin `{plugin}` is installed", hint=near + suggest(plugin, installed))
    point = installed[plugin]
    return Subject(point.name, point.dist.name if point.dist else "", point.value)


def _in_folder(folder: Path) -> Subject:
    file = folder / "pyproject.toml"
    if not file.is_file():
        raise UsageError(f"`{folder}` is not a plugin's folder: it has no pyproject.toml", hint="`qhub plugins new NAME` writes one")
    text = file.read_text(encoding="utf-8")
    name, entries = _NAME.search(text), _entries(text)
    if name is None or len(entries) != 1:
        found = f"{len(entries)} entry points" if name else "no project name"
        message = f"`{file}` has {found}; one plugin has a name and one entry point in `[project.entry-points.{GROUP}]`"
        raise UsageError(message, hint="install it, and check it by its name: `qhub plugins check NAME`")
    source = folder / "src" if (folder / "src").is_dir() else folder
    ((entry, module),) = entries.items()
    return Subject(entry, name[1], module, source.resolve())


def _entries(text: str) -> Mapping[str, str]:
    section = _SECTION.search(text)
    return dict(_ENTRY.findall(section[1])) if section else {}
