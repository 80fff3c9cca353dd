"""Makes and removes environments. A virtual environment cannot be moved, so it grows at its final place under a marker file.

What is asked for is installed in one step, with torch held to the range that qhub is tested with. An environment whose marker
is still there (the installation was killed) counts for nothing and is removed by the next installation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import qhub
from qhub.errors import PluginError, UsageError
from qhub.isolation.ask import ask, last_words
from qhub.isolation.environments import DECLARATIONS, LOCK, MARKER, Environment, Lock, environment, find_environments
from qhub.isolation.group import run_group
from qhub.locks import hold

CONSTRAINTS = ("torch>=2.6,<2.14",)
_CONSTRAINTS_FILE, _LOG = "constraints.txt", "install.log"
#: What pip is configured with through the environment and uv would not see.
_PIP_SOURCES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_CONFIG_FILE")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to install: the plugin's name (its entry point) and its requirement; `lock` repeats an earlier installation."""

    name: str
    requirement: str
    lock: Lock | None = None


def install(asked: Asked, say: Say) -> Environment:
    """Make the environment of a plugin; `say` is told what happens. Whatever goes wrong, nothing is left of it.

    :raises UsageError: when there is one already. :raises PluginError: when the installer or the plugin fails.
    """
    made = environment(asked.name)
    if made.is_complete:
        message = f"plugin `{asked.name}` already has an environment, of {made.lock.created[:10]}"
        raise UsageError(message, hint=f"`qhub plugins uninstall {asked.name}` removes it")
    with _growing(made, say) as python:
        requirements = requirements_of(asked.requirement)
        _run_installer(made, [*_installer(python), *_arguments(made, asked, requirements)], say)
        record(made, requirements)
        if asked.lock is not None:
            changed = sorted({name for name, _ in made.lock.packages.items() ^ asked.lock.packages.items()})
            say(f"not as in the lock file: {', '.join(changed)}" if changed else "every version is that of the lock file")
    return made


def record(made: Environment, requirements: tuple[str, ...]) -> None:
    """Write down what was installed and what the plugin declares.

    :raises PluginError: when the environment does not answer.
    """
    facts = ask(made, ["packages"])
    lock = Lock(facts["python"], _now(), requirements, facts["packages"])
    said = ask(made, ["declare", made.name])
    _write(made.folder / DECLARATIONS, {"lock": lock.digest, **said})
    _write(made.folder / LOCK, lock.to_json())


def remove(name: str) -> Environment:
    """Remove the environment called `name`.

    :raises UsageError: when there is none.
    """
    there = environment(name)
    if not there.folder.exists():
        known = ", ".join(one.name for one in find_environments()) or "none"
        raise UsageError(f"plugin `{name}` has no environment of its own", hint=f"known: {known}")
    _remove(there)
    return there


def requirements_of(requirement: str) -> tuple[str, ...]:
    """What the installer is asked for: the plugin, and qhub-core as it runs here; both editable from the checkout if this is one.

    `requirement` is what pip takes: `qhub-awq`, `qhub-awq==1.2`, a folder, a wheel.
    """
    checkout = _checkout()
    core = f"qhub-core=={qhub.__version__}" if checkout is None else f"-e {checkout}"
    folder = Path(requirement).resolve()
    is_ours = checkout is not None and folder.parent == checkout / "plugins"
    return f"-e {folder}" if is_ours and folder.is_dir() else requirement, core


def _checkout() -> Path | None:
    """The folder of the repository that this qhub runs from, if it does."""
    folder = Path(qhub.__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "plugins").is_dir() else None


@contextmanager
def _growing(made: Environment, say: Say) -> Iterator[Path]:
    """An empty environment under its marker; it stays if the body ends well, and goes otherwise."""
    if made.folder.exists():
        say(f"removing what an interrupted installation left in `{made.folder}`")
        _remove(made)
    made.folder.mkdir(parents=True)
    with _held(made):
        try:
            (made.folder / MARKER).write_text(f"{os.getpid()}\n", encoding="ascii")
            say(f"making `{made.folder}`")
            venv.create(made.folder, with_pip=_uv() is None, symlinks=os.name != "nt")
            yield made.python
            (made.folder / MARKER).unlink()
        except BaseException:
            shutil.rmtree(made.folder, ignore_errors=True)
            raise


def _held(made: Environment) -> ExitStack:
    """Hold the environment for this process where the system can.

    :raises UsageError: when another one is working on it.
    """
    try:
        return hold(made.folder.parent / f".{made.name}.lock", make=True)
    except BlockingIOError:
        raise UsageError(f"another process is installing or removing `{made.name}`", hint="wait until it ends") from None


def _remove(there: Environment) -> None:
    with _held(there):
        (there.folder / MARKER).touch()  # from here on it counts for nothing, however this ends
        shutil.rmtree(there.folder)


def _uv() -> str | None:
    """uv, if it is there and nothing says where packages come from that only pip would see."""
    return None if any(name in os.environ for name in _PIP_SOURCES) else shutil.which("uv")


def _installer(python: Path) -> list[str]:
    uv = _uv()
    return [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-I", "-m", "pip", "install", "--no-input"]


def _arguments(made: Environment, asked: Asked, requirements: Sequence[str]) -> list[str]:
    """Arguments of the installer: versions of the lock as they are, else what was asked under our constraints."""
    words = [word for requirement in requirements for word in as_words(requirement)]
    constraints = made.folder / _CONSTRAINTS_FILE
    pins = CONSTRAINTS if asked.lock is None else pins_of(asked.lock, requirements)
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return ["--constraint", str(constraints), *words]


def as_words(requirement: str) -> list[str]:
    """A requirement as arguments of the installer."""
    return ["-e", requirement[3:]] if requirement.startswith("-e ") else [requirement]


def pins_of(lock: Lock, requirements: Sequence[str]) -> list[str]:
    """`name==version` for all that `lock` holds but the core and the plugin where it comes from a folder: that is as it lies there."""
    folders = {Path(requirement.removeprefix("-e ")).name for requirement in requirements if "/" in requirement}
    ours = {"qhub-core", *(f"qhub-{name.removeprefix('qhub-')}" for name in folders)}
    return [f"{name}=={version}" for name, version in lock.packages.items() if name.lower() not in ours]


def _run_installer(made: Environment, command: Sequence[str], say: Say) -> None:
    say("installing (this downloads what the plugin needs): " + " ".join(command[command.index("install") + 1 :]))
    log = made.folder / _LOG
    ended = run_group(command, lambda line: _progress(line, say), log)
    if ended.code != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        message = f"`{made.name}` could not be installed: {_cause(text)}"
        raise PluginError(message, hint=f"see what it says: `pip install --dry-run {' '.join(command[-1:])}`")


def _progress(line: str, say: Say) -> None:
    if re.match(r"\s*(Collecting|Downloading|Installing collected|Successfully)", line):
        say(line.strip()[:120])


def _cause(log: str) -> str:
    errors = [line.strip()[len("ERROR: ") :] for line in log.splitlines() if line.strip().startswith("ERROR: ")]
    return errors[0] if errors else last_words(log)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(path: Path, value: Mapping[str, object]) -> None:
    partial = path.with_suffix(".partial-file")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
