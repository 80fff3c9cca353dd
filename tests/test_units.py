"""Bytes and seconds as a person reads them."""

from __future__ import annotations

import pytest

from qhub.units import human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (5_230_000, "5.23 MB"),
        (999_900_000, "1000 MB"),
        (1.2e9, "1.2 GB"),
        (3e15, "3000 TB"),
    ],
)
def test_bytes_are_read_in_decimal_units(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_seconds_are_said_as_a_person_says_them(seconds, text):
    assert human_seconds(seconds) == text
