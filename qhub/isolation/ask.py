"""One question to an environment's interpreter (`qhub.worker`): JSON in, JSON out, with a time limit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from qhub.errors import PluginError
from qhub.isolation.environments import Environment, again
from qhub.isolation.group import surroundings

TIMEOUT_S = 120.0


def ask(environment: Environment, arguments: Sequence[str], *, question: Any = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Run `python -m qhub.worker ARGUMENTS` there, with `question` as JSON on its stdin.

    :raises PluginError: when it fails, takes too long, or does not answer with an object.
    """
    command = [str(environment.python), "-I", "-m", "qhub.worker", *arguments]
    try:
        ran = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=timeout_s, env=surroundings(), check=False
        )
    except subprocess.TimeoutExpired:
        message = f"the environment `{environment.name}` did not answer `{arguments[0]}` within {timeout_s:g} s"
        raise PluginError(message, hint=f"try it by hand: `{' '.join(command)}`") from None
    except OSError as error:
        raise PluginError(f"`{environment.python}` cannot be run: {error.strerror}", hint=f"`{again(environment.name)}`") from None
    if ran.returncode != 0:
        message = f"the environment `{environment.name}` failed to answer `{arguments[0]}`: {last_words(ran.stderr)}"
        raise PluginError(message, hint=f"try it by hand: `{' '.join(command)}`")
    try:
        answer = json.loads(ran.stdout)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        message = f"the environment `{environment.name}` did not answer `{arguments[0]}` with JSON"
        raise PluginError(message, hint=f"`{again(environment.name)}`")
    return answer


def last_words(stderr: str) -> str:
    """What a process said when it failed: our own error line, else the last line of a traceback."""
    lines = [line.strip() for line in stderr.strip().splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (own or lines or ["it said nothing"])[-1]
