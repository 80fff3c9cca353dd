"""A lock is held by one process, and goes with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qhub.locks import hold

pytest.importorskip("fcntl", reason="this system has no such locks")
HOLDER = """
import sys, time
from pathlib import Path
from qhub.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["file", "folder"])
def place(request, tmp_path) -> Path:
    """Something to hold."""
    path = tmp_path / "place"
    path.touch() if request.param == "file" else path.mkdir()
    return path


def test_what_is_held_cannot_be_held_again_until_it_is_let_go(place):
    with hold(place), pytest.raises(BlockingIOError):
        hold(place)
    hold(place).close()


def test_it_ends_with_the_process_that_holds_it(place):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            hold(place)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hold(place).close()


def test_a_place_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "nowhere", make=False)
    with pytest.raises(IsADirectoryError):
        hold(tmp_path, make=True)


def test_a_file_is_made_to_be_held(tmp_path):
    hold(tmp_path / "lock", make=True).close()
    assert (tmp_path / "lock").read_bytes() == b""
