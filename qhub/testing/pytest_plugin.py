"""For pytest: `pytest --qhub-check` adds one test per check of the plugin in the root folder; the fixture `qhub_check` runs all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qhub.testing import Check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("qhub").addoption("--qhub-check", action="store_true", help="also check the plugin in the root folder with qhub's kit")


@pytest.fixture(scope="session")
def qhub_check() -> Callable[[str | Path], list[Check]]:
    """`qhub_check(NAME or PATH)` fails if a check does; see `qhub.testing.check_plugin`."""
    from qhub.testing import check_plugin

    return check_plugin


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each check, after the plugin's own."""
    if not config.getoption("--qhub-check"):
        return
    from qhub.testing import ABOUT

    results = _Results(config.rootpath)
    for name in ABOUT:
        item: CheckItem = CheckItem.from_parent(session, name=name, nodeid=f"qhub-check::{name}")
        item.results = results
        items.append(item)


class _Results:
    """What the checks found; they run once, when the first is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checks: list[Check] | None = None

    def of(self, name: str) -> list[Check]:
        """The results of the check called `name`, one for each component that it concerns."""
        from qhub.testing import find_subject, run_checks

        if self.checks is None:
            self.checks = run_checks(find_subject(self.root))
        return [check for check in self.checks if check.name == name]


class CheckItem(pytest.Item):
    """One check as a test."""

    results: _Results

    def runtest(self) -> None:
        """Fail if the check failed for any component, skip if it says nothing about this plugin."""
        from qhub.testing import FAIL, PASS

        checks = self.results.of(self.name)
        failed = [f"{check.component}: {check.reason}" for check in checks if check.outcome == FAIL]
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)
        if not any(check.outcome == PASS for check in checks):
            pytest.skip(checks[0].reason if checks else "nothing in this plugin that it is about")

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """How pytest calls it."""
        return self.path, None, self.nodeid
