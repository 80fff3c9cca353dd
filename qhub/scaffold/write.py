"""`qhub plugins new`: a complete plugin, written from templates, that passes its own tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qhub.errors import UsageError
from qhub.types import Scheme

KINDS = ("quantizer", "exporter", "runtime")
LICENSES = ("Apache-2.0", "MIT", "BSD-3-Clause")
_TEMPLATES = Path(__file__).parent / "templates"
#: template → where it goes in the new folder; `%%module%%` is replaced there too.
_FILES = {
    "common/pyproject.toml": "pyproject.toml",
    "common/README.md": "README.md",
    "common/gitignore": ".gitignore",
    "common/test.yml": ".github/workflows/test.yml",
    "common/init.py": "%%module%%/__init__.py",
    "{kind}/plugin.py": "%%module%%/plugin.py",
    "{kind}/test_plugin.py": "tests/test_plugin.py",
}
_MORE = {"runtime": {"runtime/session.py": "%%module%%/session.py"}}
_SUMMARIES = {
    "quantizer": "round to nearest on the best of several ranges",
    "exporter": "codes, scales and zeros as NumPy arrays",
    "runtime": "a reference engine in plain torch",
}
_USES = {
    "quantizer": "qhub run demo:llm --plugin {name}",
    "exporter": "qhub run demo:llm --plugin {name}",
    "runtime": "qhub run demo:llm --plugin hf --plugin {name}",
}
_LONGEST = 40
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """What to write: `name` as users will write it; the distribution is `qhub-<name>`, the module `qhub_<name>`."""

    name: str
    kind: str
    license: str = "Apache-2.0"
    author: str = ""
    scheme: str = "w4a16-g128-asym"

    @property
    def distribution(self) -> str:
        """What is installed, and how the folder is called."""
        return f"qhub-{self.name}"

    @property
    def fields(self) -> Mapping[str, str]:
        """What stands between `%%` in the templates."""
        words = "".join(part.capitalize() for part in self.name.split("-"))
        return {
            "name": self.name,
            "distribution": self.distribution,
            "module": self.distribution.replace("-", "_"),
            "class": words if words[0].isalpha() else f"Plugin{words}",
            "summary": _SUMMARIES[self.kind],
            "article": f"{'an' if self.kind == 'exporter' else 'a'} {self.kind}",
            "base": self.kind.capitalize(),
            "use": _USES[self.kind].format(name=self.name),
            "license": self.license,
            "author": self.author or f"the authors of {self.distribution}",
            "scheme": str(Scheme.parse(self.scheme)),
        }


def check_name(name: str, taken: Mapping[str, str]) -> None:
    """Refuse a name that no distribution can have, or that is `taken` (name → by what).

    :raises UsageError: with a name that would do.
    """
    if name.startswith("qhub-"):
        raise UsageError(f"`{name}` names the distribution", hint=f"leave out the `qhub-`: `{name.removeprefix('qhub-')}`")
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-method"
        message = f"`{name}` is no plugin name: lower-case letters and digits, in words joined by `-`"
        raise UsageError(message, hint=f"try `{better}`")
    if len(name) > _LONGEST:
        raise UsageError(f"`{name}` has {len(name)} letters; a plugin name has at most {_LONGEST}", hint=f"try `{name[:12].strip('-')}`")
    if name in taken:
        raise UsageError(f"`{name}` is the name of {taken[name]}", hint=f"put your own before it: `acme-{name}`")


def write_plugin(new: NewPlugin, parent: Path) -> list[Path]:
    """Write the plugin into a new folder of `parent`; the files, relative to it.

    :raises UsageError: when the folder exists.
    """
    folder = parent / new.distribution
    if folder.exists():
        raise UsageError(f"`{folder}` already exists", hint="choose another name, or remove it")
    fields = new.fields
    files = {_filled(to, fields): _read(source.format(kind=new.kind)) for source, to in (_FILES | _MORE.get(new.kind, {})).items()}
    files["LICENSE"] = (_TEMPLATES / "licenses" / f"{new.license}.txt").read_text(encoding="utf-8")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(text, fields), encoding="utf-8")
    return [folder / name for name in sorted(files)]


def _read(template: str) -> str:
    return (_TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")


def _filled(text: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"%%(\w+)%%", lambda match: fields[match[1]], text)
