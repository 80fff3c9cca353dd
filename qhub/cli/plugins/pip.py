"""Runs pip (or uv, where there is no pip) of the running environment; what they say goes to stderr."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qhub.errors import QhubError
from qhub.plugins import installed_version

#: What many plugins share: a plugin that needs another version of one of these gets an environment of its own.
SHARED = ("torch", "transformers")
_UV_CHANGE = re.compile(r"^ \+ ([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Change:
    """What an installation would do to a distribution that is installed: version `before` → version `after`."""

    distribution: str
    before: str
    after: str


def changes(requirement: str) -> list[Change]:
    """What installing `requirement` would change of what plugins share; resolves everything, installs nothing.

    :raises QhubError: when there is no set of versions that fits, or no such distribution.
    """
    command, is_pip = _installer("install")
    flags = ["--quiet", "--dry-run", "--report", "-"] if is_pip else ["--dry-run"]
    ran = subprocess.run([*command, *flags, requirement], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise _refused(requirement, ran.stderr)
    wanted = _planned(ran.stdout) if is_pip else dict(_UV_CHANGE.findall(ran.stderr))
    found = []
    for name in SHARED:
        before, after = installed_version(name), next((version for key, version in wanted.items() if key.lower() == name), None)
        if before is not None and after is not None and before != after:
            found.append(Change(name, before, after))
    return found


def install(requirement: str) -> None:
    """Install `requirement` into the running environment.

    :raises QhubError: when that fails.
    """
    _run("install", [requirement])


def uninstall(distribution: str) -> None:
    """Remove `distribution` from the running environment.

    :raises QhubError: when that fails.
    """
    _run("uninstall", [distribution])


def published(word: str) -> list[dict[str, Any]]:
    """What the package index has under the name that a plugin called `word` would have; empty when there is nothing."""
    distribution = f"qhub-{re.sub(r'[^a-z0-9]+', '-', word.lower()).strip('-')}"
    command, is_pip = _installer("index")
    if not is_pip:
        raise QhubError("searching the package index needs pip", hint=f"`{sys.executable} -m ensurepip` brings it")
    ran = subprocess.run([*command, "versions", distribution], capture_output=True, text=True, check=False)
    match = re.match(rf"{distribution} \(([^)]+)\)", ran.stdout)
    if match is None:
        return []
    state = f"not installed: qhub plugins install {distribution.removeprefix('qhub-')} --pypi"
    return [{
        "name": distribution.removeprefix("qhub-"), "distribution": distribution, "offers": "unknown",
        "summary": f"version {match[1]} on the package index, whoever published it", "state": state,
    }]  # fmt: skip


def _installer(verb: str) -> tuple[list[str], bool]:
    """The command that does `verb` in the running environment, and whether it is pip."""
    if find_spec("pip") is not None:
        yes = ["--yes"] if verb == "uninstall" else []
        return [sys.executable, "-m", "pip", verb, "--disable-pip-version-check", "--no-input", *yes], True
    uv = shutil.which("uv")
    if uv is None or verb == "index":
        raise QhubError(f"`{sys.executable}` has no pip, and there is no uv", hint=f"`{sys.executable} -m ensurepip`")
    return [uv, "pip", verb, "--python", sys.executable], False


def _run(verb: str, arguments: Sequence[str]) -> None:
    command, _ = _installer(verb)
    sys.stderr.flush()
    ran = subprocess.run([*command, *arguments], stdout=sys.stderr.fileno(), check=False)
    if ran.returncode != 0:
        raise QhubError(f"`{' '.join([*command, *arguments])}` failed", hint="what it said stands above")


def _planned(report: str) -> Mapping[str, str]:
    """Distribution → version of what pip's report would install."""
    items = json.loads(report)["install"]
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in items}


def _refused(requirement: str, said: str) -> QhubError:
    from qhub.isolation.conflicts import read_conflicts

    rules = read_conflicts(said)
    errors = [line.removeprefix("ERROR: ").removeprefix("error: ") for line in said.splitlines() if line.lower().startswith("error:")]
    why = "; ".join(rules) or (errors[0] if errors else "it said nothing")
    hint = f"`{sys.executable} -m pip install --dry-run {requirement}` says more"
    return QhubError(f"`{requirement}` cannot be installed here: {why}", hint=hint)
