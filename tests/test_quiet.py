"""While libraries are quiet nothing of theirs reaches the terminal, and afterwards all is as it was."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from qhub.plugins import PluginWarning
from qhub.quiet import quiet_libraries

tqdm = pytest.importorskip("tqdm").tqdm


def chatter() -> None:
    """All the ways in which libraries talk."""
    for _ in tqdm(range(3), desc="Compressing model"):
        pass
    for _ in tqdm(range(3), disable=False):
        pass
    logging.getLogger("some.library").warning("mind the gap")
    warnings.warn("this is old", DeprecationWarning, stacklevel=1)
    warnings.warn("this is odd", UserWarning, stacklevel=1)


def test_no_bar_log_or_warning_is_seen(capfd):
    with quiet_libraries():
        chatter()
    assert capfd.readouterr() == ("", "")


def test_prints_go_to_stderr(capfd):
    with quiet_libraries():
        print("loading")
    assert capfd.readouterr() == ("", "loading\n")


def test_our_warning_about_a_plugin_is_still_one():
    with pytest.warns(PluginWarning, match="left out"), quiet_libraries():
        warnings.warn("plugin `a` was left out", PluginWarning, stacklevel=1)


def test_errors_are_still_logged(caplog):
    with quiet_libraries():
        logging.getLogger("some.library").error("it broke")
    assert [record.message for record in caplog.records] == ["it broke"]


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_afterwards_all_is_as_it_was(capfd, fails):
    start, disabled, filters, stdout = tqdm.__init__, logging.root.manager.disable, list(warnings.filters), sys.stdout
    try:
        with quiet_libraries(), quiet_libraries():
            assert tqdm.__init__ is not start
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (tqdm.__init__, logging.root.manager.disable, list(warnings.filters), sys.stdout) == (start, disabled, filters, stdout)
    for _ in tqdm(range(3)):
        pass
    assert "3/3" in capfd.readouterr().err
