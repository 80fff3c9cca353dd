"""What the plugin's tests share: caches of their own, and C++ test programs built with CMake and a compiler of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """The user's caches are not touched by tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("QHUB_NATIVE_CACHE", raising=False)
    monkeypatch.delenv("QHUB_NATIVE_ISA", raising=False)
    return folder


@pytest.fixture(scope="session")
def native_program(tmp_path_factory) -> Callable[..., Path]:
    """`native_program(target, *options)` configures with CMake's `options`, builds one program and returns its path; once each."""
    built: dict[tuple[str, ...], Path] = {}

    def program(target: str, *options: str) -> Path:
        folder = built.get(options) or tmp_path_factory.mktemp("native")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), *generator, "-DQHUB_TESTS=ON", *options]
        for command in (configure, ["cmake", "--build", str(folder), "--target", target, "--parallel", str(os.cpu_count() or 1)]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
        built[options] = folder
        return folder / target

    return program
