"""What runs took is remembered per machine and kind of run, in a file that nothing breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qhub import history
from qhub.history import Entry, correction, key_of, load, record

ROOT = Path(__file__).parent.parent
KEY = key_of("gptq", "w4a16-g128-asym", "cpu", 1_000_000, 32768)
ENTRY = Entry("a processor x8", "peak_bytes", KEY, 1e9, 8e8)


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """The history of a user who keeps one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QHUB_NO_HISTORY", raising=False)
    return tmp_path / "qhub" / "history.jsonl"


def measured(*values: float, **changes: object) -> list[Entry]:
    return [replace(ENTRY, measured=value, **changes) for value in values]


# What earlier runs say of the next


def test_without_a_run_nothing_is_corrected():
    assert correction([], "a processor x8", "peak_bytes", KEY) is None


def test_the_factor_is_the_median_of_measured_by_estimated_and_the_basis_says_of_how_many_runs():
    assert correction(measured(8e8), "a processor x8", "peak_bytes", KEY) == history.Correction(0.8, "1 earlier run on this machine")
    found = correction(measured(8e8, 5e9, 9e8), "a processor x8", "peak_bytes", KEY)
    assert found == history.Correction(0.9, "3 earlier runs on this machine")


def test_only_the_last_runs_count():
    found = correction([*measured(*[1e8] * 20), *measured(*[9e8] * 8)], "a processor x8", "peak_bytes", KEY)
    assert found == history.Correction(0.9, "8 earlier runs on this machine")


@pytest.mark.parametrize(
    "change",
    [{"machine": "a processor x4"}, {"what": "seconds"}, {"key": key_of("awq", "w4a16-g128-asym", "cpu", 1_000_000, 32768)}],
    ids=["another machine", "another figure", "another method"],
)
def test_runs_of_another_kind_say_nothing(change):
    assert correction(measured(8e8, **change), "a processor x8", "peak_bytes", KEY) is None


# Which runs are alike: counts within a power of two.
@pytest.mark.parametrize(
    ("counts", "alike"), [((1_000_000, 40_000), True), ((600_000, 60_000), True), ((2_000_000, 32768), False), ((1_000_000, 0), False)]
)
def test_runs_of_one_size_class_are_alike(counts, alike):
    assert (key_of("gptq", "w4a16-g128-asym", "cpu", *counts) == KEY) is alike


# The file


def test_what_is_recorded_is_loaded_again_oldest_first(file):
    assert load() == ()
    assert record(measured(1e9))
    assert record(measured(2e9, 3e9))
    assert load() == tuple(measured(1e9, 2e9, 3e9))
    assert {path.name for path in file.parent.iterdir()} == {"history.jsonl", "history.lock"}


def test_it_holds_one_json_object_per_line_with_its_schema_and_no_names_of_models(file):
    record(measured(1e9))
    (line,) = file.read_text().splitlines()
    assert set(json.loads(line)) == {"schema", "time", "machine", "what", "key", "estimated", "measured"}


@pytest.mark.parametrize("value", ["1", "yes"])
def test_a_user_who_wants_none_has_none(file, monkeypatch, value):
    record(measured(1e9))
    monkeypatch.setenv("QHUB_NO_HISTORY", value)
    before = file.read_bytes()
    assert record(measured(2e9)) is False
    assert load() == ()
    assert file.read_bytes() == before


BAD = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"text"',
    "\x00\x00",
    "[" * 10000,
    json.dumps({"schema": 1}),
    json.dumps({"schema": 2, "machine": "m", "what": "seconds", "key": "k", "estimated": 1, "measured": 1}),
    json.dumps({"schema": 1, "machine": 3, "what": "seconds", "key": "k", "estimated": 1, "measured": 1}),
    json.dumps({"schema": 1, "machine": "m", "what": "seconds", "key": "k", "estimated": 0, "measured": 1}),
    json.dumps({"schema": 1, "machine": "m", "what": "seconds", "key": "k", "estimated": 1, "measured": -1}),
    json.dumps({"schema": 1, "machine": "m", "what": "seconds", "key": "k", "estimated": 1, "measured": float("nan")}),
    json.dumps({"schema": 1, "machine": "m", "what": "seconds", "key": "k", "estimated": 1, "measured": float("inf")}),
    json.dumps({"schema": 1, "machine": "m", "what": "seconds", "key": "k", "estimated": 1, "measured": "fast"}),
    json.dumps({"schema": 1, "machine": "m", "what": "peak_bytes", "key": "k", "estimated": 1, "measured": 1000}),
]


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40] or "empty")
def test_a_line_that_is_none_of_ours_is_ignored_and_swept_out(file, line):
    record(measured(1e9))
    file.write_text(f"{line}\n{file.read_text()}{line}", encoding="utf-8")
    assert load() == tuple(measured(1e9))
    assert record(measured(2e9))
    assert load() == tuple(measured(1e9, 2e9))
    assert len(file.read_text().splitlines()) == 2


def test_bytes_that_are_no_text_are_ignored(file):
    record(measured(1e9))
    file.write_bytes(os.urandom(5000) + b"\n" + file.read_bytes() + b"\xff\xfe")
    assert load() == tuple(measured(1e9))


def test_it_does_not_grow_without_bound(file):
    for start in range(0, 1200, 300):
        record(measured(*(float(5e8 + start + index) for index in range(300))))
    assert len(load()) == 500
    assert load()[-1].measured == 5e8 + 1199
    assert file.stat().st_size < 1 << 20


def test_of_a_huge_file_only_the_end_is_read(file):
    record(measured(1e9))
    line = file.read_bytes()
    with file.open("wb") as stream:
        stream.truncate(3_000_000_000)  # a hole
        stream.seek(0, 2)
        stream.write(b"\n" + line)
    assert load() == tuple(measured(1e9))
    assert record(measured(2e9))
    assert file.stat().st_size < 1000
    assert load() == tuple(measured(1e9, 2e9))


@pytest.mark.parametrize("what", ["a folder instead of the file", "a file instead of the folder", "a folder instead of the lock"])
def test_a_place_that_cannot_be_written_is_no_error(file, what):
    if what == "a folder instead of the file":
        (file / "inside").mkdir(parents=True)
    elif what == "a file instead of the folder":
        file.parent.touch()
    else:
        file.with_suffix(".lock").mkdir(parents=True)
    assert record(measured(1e9)) is False
    assert load() == ()
    assert not list(file.parent.glob("history.[0-9]*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_no_error(file):
    record(measured(1e9))
    file.parent.chmod(0o500)
    assert record(measured(2e9)) is False
    assert load() == tuple(measured(1e9))
    file.parent.chmod(0o700)


def test_a_lock_that_is_never_released_costs_the_entry_and_not_the_run(file, monkeypatch):
    import fcntl

    record(measured(1e9))
    monkeypatch.setattr(history, "_LOCK_WAIT_S", 0.001)
    with file.with_suffix(".lock").open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert record(measured(2e9)) is False
    assert load() == tuple(measured(1e9))


def test_processes_that_write_at_once_lose_nothing(file, tmp_path):
    script = """
import sys
from qhub.history import Entry, record
for index in range(20):
    assert record([Entry("m", "seconds", sys.argv[1], 1.0, 1.0 + index)])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", script, name], env=env, cwd=tmp_path) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = load()
    assert len(found) == 60
    for name in "abc":  # and each one's in its order
        assert [entry.measured for entry in found if entry.key == name] == [1.0 + index for index in range(20)]
