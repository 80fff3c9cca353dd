"""Keeps what libraries say by themselves (load reports, progress bars, warnings, prints) away from the user's terminal."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from qhub.plugins import PluginWarning


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While this lasts: no log below an error, no tqdm bar, no Python warning but ours, and prints go to stderr; undone at the end."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), _without_progress_bars(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", PluginWarning)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Every tqdm bar is made disabled; `TQDM_DISABLE` is only read while tqdm is imported, which may be over."""
    try:
        bar: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield
        return
    start = bar.__init__

    def start_disabled(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever a bar is made with
        start(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = start_disabled
    try:
        yield
    finally:
        bar.__init__ = start
