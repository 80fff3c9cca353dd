"""How many threads, and which kernel."""

from __future__ import annotations

import os

from qhub import OpenOptions, UsageError, fast_cores
from qhub_native._native import kernel_names
from qhub_native.load import Options

FORCE = "QHUB_NATIVE_ISA"


def chosen(options: OpenOptions) -> Options:
    """The settings of a session: what the user says, else the environment, else what this machine does best.

    :raises UsageError: when a kernel is forced that does not run here.
    """
    wanted = options.kernel or os.environ.get(FORCE) or None
    return Options(options.threads or fast_cores(), kernel(wanted), exact=options.exact, forced=wanted is not None)


def kernel(wanted: str | None) -> str:
    """The kernel named `wanted`, or the best one.

    :raises UsageError: when it does not run here; there is no silent fallback.
    """
    names = kernel_names()
    if wanted is None:
        return str(names[0])
    if wanted not in names:
        raise UsageError(f"kernel `{wanted}` does not run here", hint=f"these do: {', '.join(names)}")
    return wanted
