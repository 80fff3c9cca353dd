"""What goes wrong, said once: `QhubError(message, hint)` and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `qhub` command (the contract of DESIGN §6)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_ROUTE = 3
    PLUGIN_FAILED = 4
    TARGETS_NOT_MET = 5
    INTERRUPTED = 130


class QhubError(Exception):
    """A failure that the user can understand and act on.

    `message` says what, with the value found in backticks and the rule it breaks; `hint` is a command or an action.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def text(self) -> str:
        """`error: …`, a blank line, `hint: …`: what is printed where no terminal is."""
        return f"error: {self.message}" + (f"\n\nhint: {self.hint}" if self.hint else "")


class DamagedModelError(QhubError):
    """A model whose files contradict each other or hold numbers that are none: what was made from it is worth nothing."""


class UsageError(QhubError):
    """A wrong argument or an unknown name: the command line exits with 2."""

    exit_code = ExitCode.USAGE


class NoRouteError(QhubError):
    """Nothing installed can take this model to this target under these goals: exit code 3."""

    exit_code = ExitCode.NO_ROUTE


class Unsupported(NoRouteError):
    """A method or format refuses a model or scheme, naming the layers it cannot take: exit code 3."""


class PluginError(QhubError):
    """A plugin's own code failed; the message names its distribution: exit code 4."""

    exit_code = ExitCode.PLUGIN_FAILED


def failure_of(component: str, error: Exception) -> PluginError:
    """What is said when the own code of a plugin's component fails."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
    return PluginError(f"`{component}` failed: {text}", hint="run it again with `QHUB_TRACEBACK=1` set and report what it prints")
