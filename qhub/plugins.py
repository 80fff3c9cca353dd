"""Discovery: finds plugins by entry point, isolates broken ones, and answers typed questions about what is there."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from qhub import hookspecs
from qhub.errors import PluginError, QhubError, UsageError
from qhub.interfaces import Component, Exporter, Quantizer, Runtime
from qhub.isolation.environments import Environment, find_environments
from qhub.isolation.proxies import ApartPlugin
from qhub.types import ModelSource, Target

if TYPE_CHECKING:
    import click

GROUP = "qhub"
SLOW_S = 1.0  # an import that takes longer is said; a light one takes a hundredth of that
_T = TypeVar("_T")


class PluginWarning(UserWarning):
    """A plugin was left out; the message names its distribution and why."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One discovered plugin: `error` is None when it loaded, `environment` the folder it lives in when that is not this one."""

    name: str
    distribution: str
    version: str
    module: str
    error: str | None = None
    environment: Path | None = None


@dataclass
class Plugins:
    """The loaded plugins. Made by `load()`, passed down; the hub keeps no global."""

    manager: pluggy.PluginManager
    infos: list[PluginInfo] = field(default_factory=list)

    @classmethod
    def load(cls, entry_points: Iterable[metadata.EntryPoint] | None = None) -> Plugins:
        """Load every allowed entry point of group `qhub`, each in its own try, then what lives in environments of its own.

        `QHUB_PLUGINS=a,b` loads only those (empty: none); `QHUB_DISABLED_PLUGINS=a,b` blocks those. Given entry points, only
        those are loaded.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        plugins = cls(manager)
        found = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        for point in sorted(found, key=lambda point: point.name):
            if _allowed(point.name):
                plugins._add(point)
        for environment in find_environments() if entry_points is None else ():
            if _allowed(environment.name):
                plugins._add_apart(environment)
        return plugins

    def _add(self, point: metadata.EntryPoint) -> None:
        distribution = point.dist.name if point.dist else point.value.partition(".")[0]
        version = point.dist.version if point.dist else "unknown"
        started = time.perf_counter()
        error = self._register(point)
        seconds = time.perf_counter() - started
        self.infos.append(PluginInfo(point.name, distribution, version, point.value, error))
        if error is not None:
            text = f"plugin `{point.name}` of `{distribution}` was left out: {error}"
            warnings.warn(text, PluginWarning, stacklevel=3)
        elif seconds > SLOW_S:
            why = f"took {seconds:.1f} s to import; `QHUB_DISABLED_PLUGINS={point.name}` goes without it"
            warnings.warn(f"plugin `{point.name}` of `{distribution}` {why}", PluginWarning, stacklevel=3)

    def _add_apart(self, environment: Environment) -> None:
        """Stand-ins for what an environment's plugin declared; one that also works here is used here."""
        here = next((info for info in self.infos if info.name == environment.name), None)
        if here is not None and here.error is None:
            text = f"plugin `{here.name}` is installed here and in `{environment.folder}`: the one here is used"
            warnings.warn(text, PluginWarning, stacklevel=3)
            return
        self.infos = [info for info in self.infos if info is not here]
        try:
            plugin = ApartPlugin(environment)
        except QhubError as error:
            self._leave_out_apart(environment, error)
            return
        self.manager.register(plugin, name=environment.name)
        found = PluginInfo(environment.name, plugin.distribution, plugin.version, "", environment=environment.folder)
        self.infos = sorted([*self.infos, found], key=lambda info: info.name)

    def _leave_out_apart(self, environment: Environment, error: QhubError) -> None:
        self.infos.append(PluginInfo(environment.name, environment.name, "unknown", "", error.message, environment.folder))
        text = f"plugin `{environment.name}` in an environment of its own was left out: {error.message}; {error.hint}"
        warnings.warn(text, PluginWarning, stacklevel=4)

    def _register(self, point: metadata.EntryPoint) -> str | None:
        module: Any = None
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is data: a plugin that greets must not spoil it
                module = point.load()
            self.manager.register(module, name=point.name)
            self.manager.check_pending()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's import may fail in any way; the others must go on
            if module is not None and self.manager.is_registered(module):
                self.manager.unregister(module)
            return f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return None

    def _call(self, hook: str) -> list[tuple[PluginInfo, Any]]:
        """The components of every plugin; one that raises is left out with a warning."""
        result: list[tuple[PluginInfo, Any]] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            info = self._info(implementation.plugin_name)
            try:
                result.extend((info, component) for component in _components(info, hook, implementation.function))
            except PluginError as error:
                warnings.warn(error.message, PluginWarning, stacklevel=4)
        return sorted(result, key=lambda pair: pair[1].name)

    def _info(self, plugin_name: str) -> PluginInfo:
        return next(info for info in self.infos if info.name == plugin_name)

    def _named(self, hook: str) -> dict[str, Any]:
        owners: dict[str, str] = {}
        named: dict[str, Any] = {}
        for info, component in self._call(hook):
            if component.name in named:
                message = f"two plugins offer `{component.name}`: `{owners[component.name]}` and `{info.distribution}`"
                raise PluginError(message, hint=f"disable one: `QHUB_DISABLED_PLUGINS={info.name}`, or `pip uninstall {info.distribution}`")
            owners[component.name], named[component.name] = info.distribution, component
        return named

    @cached_property
    def quantizers(self) -> Mapping[str, Quantizer]:
        """Methods by name."""
        return self._named("qhub_quantizers")

    @cached_property
    def exporters(self) -> Mapping[str, Exporter]:
        """Format writers by name."""
        return self._named("qhub_exporters")

    @cached_property
    def runtimes(self) -> Mapping[str, Runtime]:
        """Engines by name."""
        return self._named("qhub_runtimes")

    @cached_property
    def targets(self) -> Mapping[str, Target]:
        """Devices that plugins add to `registry.yaml`."""
        return self._named("qhub_targets")

    @cached_property
    def models(self) -> Mapping[str, ModelSource]:
        """Models that plugins bring along."""
        return self._named("qhub_models")

    def add_commands(self, cli: click.Group) -> None:
        """Let every plugin add its commands to `cli`."""
        for implementation in self.manager.hook.qhub_commands.get_hookimpls():
            try:
                implementation.function(cli=cli)
            except Exception as error:  # noqa: BLE001 - a plugin's own code
                failed = _failed(self._info(implementation.plugin_name), "qhub_commands", error)
                warnings.warn(failed.message, PluginWarning, stacklevel=2)

    def components_of(self, plugin_name: str) -> dict[str, list[str]]:
        """What the plugin called `plugin_name` offers: kind → names.

        :raises UsageError: when no plugin of that name is installed.
        :raises PluginError: when it is installed and broken.
        """
        known = [info.name for info in self.infos]
        if plugin_name not in known:
            raise UsageError(f"unknown plugin `{plugin_name}`", hint=suggest(plugin_name, known))
        info = self._info(plugin_name)
        if info.error is not None:
            raise PluginError(f"plugin `{info.name}` of `{info.distribution}` is broken: {info.error}", hint=_reinstall(info))
        plugin = self.manager.get_plugin(plugin_name)
        offers: dict[str, list[str]] = {}
        for kind in ("quantizers", "exporters", "runtimes", "targets", "models"):
            function: Callable[[], Iterable[Any]] | None = getattr(plugin, f"qhub_{kind}", None)
            if function is not None:
                offers[kind] = [component.name for component in _components(info, f"qhub_{kind}", function)]
        return offers


def _components(info: PluginInfo, hook: str, function: Callable[[], Iterable[Any]]) -> list[Any]:
    try:
        return sorted(function(), key=lambda component: str(component.name))
    except Exception as error:
        raise _failed(info, hook, error) from error


def _failed(info: PluginInfo, hook: str, error: Exception) -> PluginError:
    message = f"plugin `{info.name}` of `{info.distribution}` failed in `{hook}`: {type(error).__name__}: {error}"
    return PluginError(message, hint=_reinstall(info))


def _reinstall(info: PluginInfo) -> str:
    return f"`pip install --force-reinstall {info.distribution}`, or do without it: `QHUB_DISABLED_PLUGINS={info.name}`"


def missing_modules(component: Component) -> tuple[str, ...]:
    """The modules in `component.requires` that cannot be imported here; imports nothing."""
    return tuple(name for name in component.requires if importlib.util.find_spec(name.partition(".")[0]) is None)


def installed_version(distribution: str) -> str | None:
    """The version of `distribution` in the running environment; None if it is not installed. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, all known ones, and how to install more."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    parts = [f"did you mean `{near[0]}`?"] if near else []
    parts.append(f"known: {', '.join(known) or 'none'}")
    return " ".join([*parts, f"(a plugin may bring it: `pip install qhub-{name}`)"])


def _allowed(name: str) -> bool:
    only = os.environ.get("QHUB_PLUGINS")
    blocked = os.environ.get("QHUB_DISABLED_PLUGINS", "").split(",")
    return name not in blocked and (only is None or name in only.split(","))
