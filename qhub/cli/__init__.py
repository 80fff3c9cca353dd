"""The command line: `main()`, the lazy list of commands, and what every command is given (`App`).

A command is one file `qhub/cli/<name>.py` with one click command. It takes the `App` with `@click.pass_obj`, prints only
through `app.output`, raises `QhubError` for what can go wrong, and returns an `ExitCode` (or None for 0).
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import click

from qhub import __version__
from qhub.cli.output import Output
from qhub.errors import ExitCode, QhubError, UsageError

if TYPE_CHECKING:
    from qhub.plugins import Plugins

#: command → (where it is, what it does). The text is here so that `qhub --help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "recommend": ("qhub.cli.recommend:recommend", "Which way to take a model to a device, and why"),
    "run": ("qhub.cli.run:run", "Quantize, export, evaluate and report in one go"),
    "eval": ("qhub.cli.eval:evaluate", "Measure an artifact on a text"),
    "bench": ("qhub.cli.bench:bench", "Measure how fast an artifact runs here"),
    "chat": ("qhub.cli.chat:chat", "Talk to a model, in a terminal or through a pipe"),
    "convert": ("qhub.cli.convert:convert", "Write a quantized model in another layout"),
    "inspect": ("qhub.cli.inspect:inspect", "What a model or an artifact is, from its headers"),
    "report": ("qhub.cli.report:report", "Show what a run found"),
    "reproduce": ("qhub.cli.reproduce:reproduce", "Repeat a run, and say that all is the same or what is not"),
    "plugins": ("qhub.cli.plugins:plugins", "Which methods, formats and engines are installed"),
    "targets": ("qhub.cli.targets:targets", "Which devices are known, and their facts"),
}


@dataclass
class App:
    """What every command is given; made once per process by `main()`."""

    output: Output = field(default_factory=Output)
    #: The command that continues the present one after an interruption.
    resume: str | None = None

    @cached_property
    def plugins(self) -> Plugins:
        """The installed plugins, loaded when first asked for."""
        from qhub.plugins import Plugins

        return Plugins.load()


class LazyGroup(click.Group):
    """Imports a command when it is called, and asks plugins only for commands that the core does not have."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's commands in the order of the work, then those of plugins by name."""
        return [*COMMANDS, *sorted(self._of_plugins(ctx))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`, or None."""
        if cmd_name not in COMMANDS:
            return self._of_plugins(ctx).get(cmd_name)
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which ones exist.

        :raises UsageError: when there is no such command.
        """
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from qhub.plugins import suggest

            raise UsageError(f"unknown command `{args[0]}`", hint=suggest(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing the core's."""
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        rows += [(name, command.get_short_help_str()) for name, command in sorted(self._of_plugins(ctx).items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _of_plugins(self, ctx: click.Context) -> dict[str, click.Command]:
        app = ctx.find_object(App)
        if app is None:
            return {}
        if "plugin_commands" not in ctx.meta:
            group = click.Group()
            app.plugins.add_commands(group)
            ctx.meta["plugin_commands"] = {name: command for name, command in group.commands.items() if name not in COMMANDS}
        commands: dict[str, click.Command] = ctx.meta["plugin_commands"]
        return commands


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="qhub", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Quantize a neural network once, deploy it anywhere."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the entry point of the `qhub` command."""
    app = App()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: app.output.warning(str(message))
        try:
            code = cli.main(arguments, prog_name="qhub", standalone_mode=False, obj=app)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - the one place that turns errors into exit codes
            return int(_report(error, app))
    return int(code or ExitCode.OK)


def _report(error: BaseException, app: App) -> ExitCode:
    if os.environ.get("QHUB_TRACEBACK") and not isinstance(error, (SystemExit, click.ClickException)):
        import traceback

        app.output.text(traceback.format_exc().rstrip())
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        how = f"`{app.resume}` continues where it stopped" if app.resume else "nothing was left half written"
        app.output.text(f"interrupted: {how}")
        return ExitCode.INTERRUPTED
    if isinstance(error, (SystemExit, BrokenPipeError)):  # click turns a closed pipe into SystemExit
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - nothing may fail when the interpreter flushes
        return ExitCode.FAILED
    known = _as_qhub_error(error, app)
    app.output.error(known.message, known.hint)
    return known.exit_code


def _as_qhub_error(error: BaseException, app: App) -> QhubError:
    if isinstance(error, QhubError):
        return error
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for `{error.filename}`" if error.filename else ""
        then = f"`{app.resume}`" if app.resume else "run it again"
        return QhubError(f"no space left on the device{where}", hint=f"free some space, then {then}")
    if isinstance(error, OSError) and error.filename is not None:
        return QhubError(f"`{error.filename}`: {(error.strerror or str(error)).lower()}", hint="check the path and its permissions")
    if isinstance(error, MemoryError):
        return QhubError("out of memory", hint="give a bound with `--max-memory GB`, or close other programs")
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return QhubError(f"internal error: {text}", hint="run it again with `QHUB_TRACEBACK=1` set and report what it prints")


def _usage_error(error: click.ClickException) -> UsageError:
    """The same words as our own errors: backticks, no capital, no full stop."""
    context = getattr(error, "ctx", None)
    hint = f"see `{context.command_path if context else 'qhub'} --help`"
    if isinstance(error, click.NoSuchOption):
        near = f"did you mean `{error.possibilities[0]}`? " if error.possibilities else ""
        return UsageError(f"unknown option `{error.option_name}`", hint=near + hint)
    text = re.sub(r"'([^']*)'", r"`\1`", error.format_message()).rstrip(".")
    return UsageError(re.sub(r"(^|: )([A-Z])", lambda match: match[0].lower(), text), hint=hint)
