"""The conformance kit for plugin authors: what `qhub plugins check` runs, for a plugin's own tests.

    from pathlib import Path
    from qhub.testing import check_plugin

    def test_it_conforms():
        check_plugin(Path(__file__).parents[1])

Each check is a `Check` with a name, what it is about, an outcome and a reason. The plugin under test runs in processes of its
own, where nothing reaches the network and nothing is written outside the folders it is given.
"""

from __future__ import annotations

from pathlib import Path

from qhub.testing.kit import run_checks
from qhub.testing.result import ABOUT, FAIL, PASS, SKIP, Check
from qhub.testing.subject import Subject, find_subject

__all__ = [
    "ABOUT", "FAIL", "PASS", "SKIP", "Check", "Subject", "check_exporter", "check_plugin", "check_quantizer", "check_runtime",
    "find_subject", "run_checks",
]  # fmt: skip


def check_plugin(plugin: str | Path) -> list[Check]:
    """Run every check on an installed plugin (its name) or on one in a folder (its path).

    :raises AssertionError: when a check fails, naming each and why.
    :raises UsageError: when there is no such plugin.
    """
    return _assert_passed(run_checks(find_subject(plugin)))


def check_quantizer(plugin: str | Path) -> list[Check]:
    """`check_plugin` for a plugin that must offer a quantizer."""
    return _assert_kind("quantizer", check_plugin(plugin))


def check_exporter(plugin: str | Path) -> list[Check]:
    """`check_plugin` for a plugin that must offer an exporter."""
    return _assert_kind("exporter", check_plugin(plugin))


def check_runtime(plugin: str | Path) -> list[Check]:
    """`check_plugin` for a plugin that must offer a runtime."""
    return _assert_kind("runtime", check_plugin(plugin))


def _assert_passed(checks: list[Check]) -> list[Check]:
    failed = [f"{check.name} ({check.component}): {check.reason}" for check in checks if check.outcome == FAIL]
    if failed:
        raise AssertionError("\n".join(failed))
    return checks


def _assert_kind(kind: str, checks: list[Check]) -> list[Check]:
    if not any(check.component.startswith(f"{kind} ") for check in checks):
        raise AssertionError(f"the plugin offers no {kind}")
    return checks
