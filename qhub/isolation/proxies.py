"""Components of a plugin that lives in an environment of its own: they say here what it declared, and do nothing themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qhub.errors import PluginError, QhubError
from qhub.hookspecs import hookimpl
from qhub.interfaces import Component, Exporter, Quantizer, Runtime, Session
from qhub.isolation.environments import Environment
from qhub.types import ModelProfile, OpenOptions, Scheme, Target


class _Apart:
    environment: ClassVar[Environment]
    declared: ClassVar[Mapping[str, Any]]

    def _refused(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """What the plugin said when it was asked about each task and each scheme; about this model it is asked when a run is planned."""
        task: str | None = self.declared["tasks"].get(profile.task)
        if task is not None or str(scheme) in self.declared["schemes"]:
            return task
        said: str | None = self.declared["refused"].get(str(scheme))
        return said or f"`{self.declared['name']}` did not say that it takes scheme `{scheme}`"


class ApartQuantizer(_Apart, Quantizer):
    """A method whose code is elsewhere: the stage that it works in runs there."""

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """What was declared."""
        return self._refused(profile, scheme)


class ApartExporter(_Apart, Exporter):
    """A format whose code is elsewhere."""

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """What was declared."""
        return self._refused(profile, scheme)


class ApartRuntime(_Apart, Runtime):
    """An engine whose code is elsewhere: it verifies artifacts there, and opens none here."""

    def reject(self, target: Target) -> str | None:
        """What was declared for the device of that name."""
        reason: str | None = self.declared["targets"].get(target.name)
        return reason

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Not possible: a session lives in the process that asked for it.

        :raises PluginError: always.
        """
        message = f"`{self.name}` lives in the environment `{self.environment.name}`, so `{path}` cannot be opened in this process"
        raise PluginError(message, hint="`qhub run` verifies and measures artifacts of such engines")


_BASES: Mapping[str, tuple[type[Component], tuple[str, ...]]] = {
    "quantizer": (ApartQuantizer, ("family", "default_scheme", "scales", "options", "whole")),
    "exporter": (ApartExporter, ("format",)),
    "runtime": (ApartRuntime, ()),
}


def proxy(environment: Environment, declared: Mapping[str, Any]) -> Component:
    """The component that stands for what `declared` says."""
    base, keys = _BASES[declared["kind"]]
    facts = {key: declared[key] for key in ("name", "summary", "distribution", *keys)}
    if "needs" in declared:
        facts["needs"] = frozenset(declared["needs"])
    for key in {"formats", "families"} & set(declared):
        facts[key] = tuple(declared[key])
    kind = type(declared["name"], (base,), {**facts, "environment": environment, "declared": declared, "__doc__": declared["summary"]})
    made: Component = kind()
    return made


class ApartPlugin:
    """All that one environment's plugin declared, behind the same hooks as any plugin's."""

    def __init__(self, environment: Environment) -> None:
        """Read the declarations.

        :raises QhubError: when they are missing or damaged.
        """
        said = environment.declarations()
        try:
            self.version = str(said["version"])
            self.distribution = str(said["distribution"])
            self._components = {kind: [proxy(environment, one) for one in said["components"] if one["kind"] == kind] for kind in _BASES}
        except (KeyError, TypeError, AttributeError) as error:
            raise QhubError(f"the declarations of `{environment.name}` cannot be read: {type(error).__name__}: {error}") from None

    @hookimpl
    def qhub_quantizers(self) -> Sequence[Component]:
        """Its methods."""
        return self._components["quantizer"]

    @hookimpl
    def qhub_exporters(self) -> Sequence[Component]:
        """Its formats."""
        return self._components["exporter"]

    @hookimpl
    def qhub_runtimes(self) -> Sequence[Component]:
        """Its engines."""
        return self._components["runtime"]


def home_of(component: Component) -> Environment | None:
    """The environment that the component lives in; None for one that lives here."""
    return getattr(component, "environment", None)
