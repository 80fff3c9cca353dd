"""The `native` runtime: QuantizedModels of language models on this machine's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import OpenOptions, Runtime, Target, hookimpl

if TYPE_CHECKING:
    import click

    from qhub import Session

_ARCHITECTURES = ("x86_64", "arm64", "aarch64")


class NativeRuntime(Runtime):
    """int4 and int8 kernels of our own; the format is the QuantizedModel as it is."""

    name = "native"
    summary = "int4 and int8 CPU kernels"
    distribution = "qhub-native"
    requires = ("tokenizers",)
    formats = ("compressed-tensors",)
    rounds_activations = True

    def reject(self, target: Target) -> str | None:
        """Runs on 64-bit x86 and Arm processors under Linux and macOS."""
        if target.os not in ("linux", "macos"):
            return f"`native` does not run on `{target.os}`"
        return None if target.arch in _ARCHITECTURES else f"`native` has no kernels for `{target.arch}`"

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Map the packed weights, or pack them if this is the first time."""
        from qhub_native.session import NativeSession
        from qhub_native.settings import chosen

        return NativeSession(path, chosen(options))


@hookimpl
def qhub_runtimes() -> Sequence[Runtime]:
    """Offer `native`."""
    return [NativeRuntime()]


@hookimpl
def qhub_commands(cli: click.Group) -> None:
    """Add `qhub native`."""
    from qhub_native.commands import native

    cli.add_command(native)
