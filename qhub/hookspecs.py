"""The hooks: what a plugin may offer. Each takes nothing, returns cheap descriptors, and has no order.

A hook is called at most once per process, the first time somebody asks for that kind of component. Descriptors must not
import heavy modules (torch, transformers, a vendor SDK): do that inside the method that works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    import click

    from qhub.interfaces import Exporter, Quantizer, Runtime
    from qhub.types import ModelSource, Target

PROJECT = "qhub"
_F = TypeVar("_F", bound=Callable[..., Any])
_spec = pluggy.HookspecMarker(PROJECT)

hookimpl = pluggy.HookimplMarker(PROJECT)


def _hook(function: _F) -> _F:
    return _spec(function)


@_hook
def qhub_quantizers() -> Sequence[Quantizer]:  # type: ignore[empty-body]
    """Methods that make a model small. Called when a route is looked for and when one runs."""


@_hook
def qhub_exporters() -> Sequence[Exporter]:  # type: ignore[empty-body]
    """Writers of file formats. Called when a route is looked for and after quantization."""


@_hook
def qhub_runtimes() -> Sequence[Runtime]:  # type: ignore[empty-body]
    """Engines that run an artifact. Called when a route is looked for and before evaluation."""


@_hook
def qhub_targets() -> Sequence[Target]:  # type: ignore[empty-body]
    """Devices beyond those of `registry.yaml`. Called when a target name is looked up."""


@_hook
def qhub_models() -> Sequence[ModelSource]:  # type: ignore[empty-body]
    """Models that come with the plugin, e.g. `demo:llm`. Called when MODEL is not a path."""


@_hook
def qhub_commands(cli: click.Group) -> None:
    """Add commands to `cli`. Called when `qhub` starts with a command the core does not have, or shows help."""
