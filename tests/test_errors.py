"""Errors carry what, why and what to do; their class decides the exit code."""

from __future__ import annotations

import pytest

from qhub.errors import DamagedModelError, ExitCode, NoRouteError, PluginError, QhubError, Unsupported, UsageError


@pytest.mark.parametrize(
    ("kind", "code"),
    [(QhubError, 1), (DamagedModelError, 1), (UsageError, 2), (NoRouteError, 3), (Unsupported, 3), (PluginError, 4)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_kind_of_error_decides_the_exit_code(kind, code):
    assert kind("it broke").exit_code == code


def test_exit_codes_are_the_contract():
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "NO_ROUTE": 3,
        "PLUGIN_FAILED": 4,
        "TARGETS_NOT_MET": 5,
        "INTERRUPTED": 130,
    }


def test_an_error_has_a_message_and_perhaps_a_hint():
    error = QhubError("`x` is missing", hint="make `x`")
    assert (str(error), error.message, error.hint) == ("`x` is missing", "`x` is missing", "make `x`")
    assert QhubError("`x` is missing").hint is None
