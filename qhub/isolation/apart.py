"""Runs a stage where its plugin lives: in this process, or by the interpreter of the plugin's own environment.

There it is `python -m qhub.stage NAME RUN_DIR`, in a process group that never outlives this process. Its events are
handed on as they come; what it prints beside them is kept in the run directory while the stage works.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qhub import errors
from qhub.errors import PluginError, QhubError, Unsupported, UsageError
from qhub.events import Events
from qhub.interfaces import Component
from qhub.isolation.ask import ask, last_words
from qhub.isolation.environments import Environment, locked_versions
from qhub.isolation.group import Ended, Limits, run_group
from qhub.isolation.proxies import home_of
from qhub.plugins import Plugins
from qhub.route.recipe import from_yaml
from qhub.rundir import RunDir
from qhub.stage import execute
from qhub.types import ModelProfile, Recipe, as_json

TIMEOUT = "QHUB_STAGE_TIMEOUT"


def execute_at_home(name: str, run: RunDir, plugins: Plugins, events: Events) -> RunDir:
    """Run stage `name` where the plugin that works in it lives; returns the run with it done.

    :raises PluginError: when the plugin fails, its process is killed or takes longer than `QHUB_STAGE_TIMEOUT` seconds.
    :raises QhubError: what the stage raised there, and when its processes need more memory than the run may use.
    """
    environment = home(name, from_yaml(run.recipe.read_text(encoding="utf-8")), plugins)
    return execute(name, run, plugins, events) if environment is None else _execute_apart(name, run, environment, events)


def home(stage: str, recipe: Recipe, plugins: Plugins) -> Environment | None:
    """The environment that `stage` of a run of `recipe` works in; None for this one.

    :raises UsageError: when methods of different environments are to work together.
    """
    named: Mapping[str, tuple[Mapping[str, Component], tuple[str, ...]]] = {
        "quantize": (plugins.quantizers, tuple(recipe.method.split("+"))),
        "export": (plugins.exporters, (recipe.exporter or "",)),
        "verify": (plugins.runtimes, (recipe.runtime or "",)),
    }
    components, names = named.get(stage, ({}, ()))
    homes = {name: home_of(components[name]) for name in names if name in components}
    if len({environment.name if environment else None for environment in homes.values()}) > 1:
        apart = next(name for name, environment in homes.items() if environment is not None)
        message = f"`{recipe.method}` cannot be combined: `{apart}` lives in an environment of its own"
        raise UsageError(message, hint=f"use `--plugin {apart}` alone")
    return next(iter(homes.values()), None)


def check_apart(recipe: Recipe, found: ModelProfile, plugins: Plugins) -> Recipe:
    """Ask the environment of the recipe's method whether it takes the model; returns the recipe with what is installed there.

    :raises Unsupported: with its reason. :raises PluginError: when it does not answer.
    """
    environment = home("quantize", recipe, plugins)
    if environment is None:
        return recipe
    question = {"method": recipe.method, "profile": as_json(found), "scheme": recipe.scheme}
    reason = ask(environment, ["reject"], question=question)["reason"]
    if reason is not None:
        raise Unsupported(reason, hint=f"`qhub recommend {found.path} --explain` shows what is possible")
    tools = (f"{environment.name}/{tool}" for tool in environment.declarations()["tools"])
    return replace(recipe, versions={**recipe.versions, **locked_versions(tools)})


@dataclass
class _Elsewhere:
    """A stage at work in an environment: what it said of its failure, and where what it printed is kept."""

    name: str
    run: RunDir
    environment: Environment
    events: Events
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.run.work / f"{self.name}.log"

    def hear(self, line: str) -> None:
        """One line of its standard output."""
        event = _event(line)
        if event is None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        elif event["event"] == "error":
            self.failures.append(event)
        else:
            self.events.relay(event)

    def printed(self) -> str:
        """What it printed beside its events."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def failure(self, ended: Ended) -> QhubError:
        """Why it failed, as an error that the user can act on."""
        who = f"stage `{self.name}` of `{self.environment.name}`"
        if ended.over == "memory":
            bound = (self.run.settings.max_memory_bytes or 0) / 1e9
            message = f"{who} took `{ended.peak_bytes / 1e9:.2f}` GB of memory, more than the bound of {bound:.2f} GB"
            return QhubError(message, hint="give a larger `--max-memory`, or fewer `--samples`")
        if ended.over == "time":
            message = f"{who} took longer than `{os.environ[TIMEOUT]}` s, the limit of {TIMEOUT}"
            return PluginError(message, hint=f"give it more time, or none: `unset {TIMEOUT}`")
        if self.failures:
            said = self.failures[-1]
            kind: type[QhubError] = getattr(errors, str(said["kind"]), PluginError)
            return kind(said["message"], hint=said["hint"])
        if ended.signal is not None:
            message = f"{who} was killed by signal {int(ended.signal)} ({ended.signal.name})"
            return PluginError(message, hint="run it again; if nobody killed it, memory may have run out: try fewer `--samples`")
        message = f"{who} ended with exit code `{ended.code}`: {last_words(self.printed())}"
        return PluginError(message, hint="run it again with `QHUB_TRACEBACK=1` set and report what it prints")


def _execute_apart(name: str, run: RunDir, environment: Environment, events: Events) -> RunDir:
    run.work.mkdir(exist_ok=True)
    stage = _Elsewhere(name, run, environment, events)
    command = [str(environment.python), "-I", "-m", "qhub.stage", name, str(run.path.resolve())]
    ended = run_group(command, stage.hear, stage.log, Limits(_timeout_s(), run.settings.max_memory_bytes))
    if ended.code != 0 or ended.over is not None:
        if os.environ.get("QHUB_TRACEBACK"):
            print(stage.printed(), file=sys.stderr)
        raise stage.failure(ended)
    return RunDir.open(run.path)


def _event(line: str) -> dict[str, Any] | None:
    """The event that a line holds; None for what a library printed past Python's streams."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _timeout_s() -> float | None:
    given = os.environ.get(TIMEOUT)
    try:
        seconds = None if not given else float(given)
    except ValueError:
        seconds = 0.0
    if seconds is not None and not seconds > 0:
        raise UsageError(f"`{TIMEOUT}={given}` is not a number of seconds above 0", hint=f"`unset {TIMEOUT}` for no limit")
    return seconds
