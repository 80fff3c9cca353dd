"""Whether a plugin can live in the running environment: asks pip, which resolves and installs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from qhub.errors import QhubError
from qhub.isolation.install import as_words, requirements_of

TIMEOUT_S = 300.0


def conflicts(requirements: Sequence[str]) -> list[str]:
    """Why `requirements` cannot be installed here without changing what is installed: one line per rule that collides.

    Empty when they can. Needs the package index.

    :raises QhubError: when pip cannot be run or finds no such distribution.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("\n".join(_installed()) + "\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--quiet"]
        command = [*pip, "--constraint", str(constraints), *requirements]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise QhubError(f"pip took longer than {TIMEOUT_S:g} s to look for conflicts", hint="try again later") from None
    if ran.returncode == 0:
        return []
    found = read_conflicts(ran.stderr + ran.stdout)
    if not found:
        raise QhubError(f"pip cannot resolve `{' '.join(requirements)}`: {_error(ran.stderr)}", hint="check the name and the network")
    return found


def explain_conflict(distribution: str) -> str | None:
    """One sentence that names what keeps `distribution` out of the running environment; None when nothing does.

    :raises QhubError: as `conflicts` does.
    """
    found = conflicts([word for requirement in requirements_of(distribution) for word in as_words(requirement)])
    return f"`{distribution}` cannot live here: {'; '.join(found)}" if found else None


def read_conflicts(text: str) -> list[str]:
    """The rules that collide, from what pip prints when it finds no set of versions."""
    lines = [line.strip() for line in text.splitlines()]
    start = next((index for index, line in enumerate(lines) if line.startswith("The conflict is caused by")), None)
    if start is None:
        return [line.removeprefix("ERROR: ") for line in lines if re.search(r"because these package versions have conflicting", line)]
    rules = []
    for line in lines[start + 1 :]:
        if not line:
            break
        rules.append(re.sub(r"^The user requested \(constraint\) (\S+)==(\S+)$", r"\1 \2 is installed here", line))
    return list(dict.fromkeys(rules))


def _installed() -> list[str]:
    found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return [f"{name}=={version}" for name, version in found.items() if name and not name.startswith("qhub")]


def _error(text: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "it said nothing"
