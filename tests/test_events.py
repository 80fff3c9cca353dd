"""Events: to the file and to the listener, and what a stage and its blocks say."""

from __future__ import annotations

import json

import pytest

from qhub.events import Events, Progress, give_back_memory, peak_rss_bytes, rss_bytes


def test_every_event_is_one_line_of_json_and_reaches_the_listener(tmp_path):
    heard = []
    events = Events(file=tmp_path / "events.jsonl", listener=heard.append)
    events.note("hello")
    events.warning("careful\nsecond line")
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == heard
    assert [(event["event"], event["text"]) for event in heard] == [("note", "hello"), ("warning", "careful\nsecond line")]


def test_a_second_process_appends_to_the_file(tmp_path):
    for text in ("first", "second"):
        Events(file=tmp_path / "events.jsonl").note(text)
    assert len((tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_stage_reports_its_seconds_and_peak_memory():
    heard = []
    events = Events(listener=heard.append)
    with events.stage("quantize"):
        pass
    start, end = heard
    assert (start["event"], start["name"], start["state"]) == ("stage", "quantize", "start")
    assert (end["event"], end["name"], end["state"]) == ("stage", "quantize", "end")
    assert events.stages == [{"name": "quantize", "seconds": end["seconds"], "peak_rss_bytes": end["peak_rss_bytes"]}]
    assert end["seconds"] >= 0
    assert end["peak_rss_bytes"] > 1_000_000


def test_a_stage_that_fails_is_not_counted_as_done():
    events = Events()
    with pytest.raises(ZeroDivisionError), events.stage("quantize"):
        raise ZeroDivisionError
    assert events.stages == []


def test_progress_counts_blocks_from_one_and_ends_with_nothing_left():
    heard = []
    progress = Progress(Events(listener=heard.append), "quantize", count=3)
    for index in range(3):
        progress.block(index, f"layers.{index}", error=0.5)
    assert [(event["stage"], event["index"], event["count"], event["name"]) for event in heard] == [
        ("quantize", 1, 3, "layers.0"),
        ("quantize", 2, 3, "layers.1"),
        ("quantize", 3, 3, "layers.2"),
    ]
    assert heard[-1]["seconds_left"] == 0
    assert heard[-1]["error"] == 0.5


def test_time_left_after_a_resume_counts_only_blocks_done_here():
    heard = []
    progress = Progress(Events(listener=heard.append), "quantize", count=10)
    progress.started -= 4.0  # the block below took four seconds
    progress.block(7, "layers.7")
    assert heard[0]["seconds_left"] == pytest.approx(8.0, abs=0.5)


def test_memory_now_is_at_most_the_peak():
    assert 1_000_000 < rss_bytes() <= peak_rss_bytes() * 1.01


def test_memory_that_was_freed_goes_back_to_the_system():
    blocks = [bytearray(1 << 16) for _ in range(2000)]  # too small to be mapped one by one
    kept = blocks[-1]
    before = rss_bytes()
    del blocks
    give_back_memory()
    assert rss_bytes() < before - 64_000_000
    assert len(kept) == 1 << 16
