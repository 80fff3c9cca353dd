"""Every kernel that this processor runs, against float64 in a C++ program, plainly and with the sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("avx512_vnni", "avx_vnni", "avx2", "scalar")
ABSENT = [program for program in ("c++", "cmake") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not on this machine: {', '.join(ABSENT)}")


@pytest.fixture(scope="module")
def plain(native_program) -> Path:
    return native_program("kernels_test")


@pytest.fixture(scope="module")
def sanitized(native_program) -> Path:
    return native_program("kernels_test", "-DQHUB_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def listed(program: Path) -> list[str]:
    return run(program, "--list").stdout.split()


def check(program: Path, name: str) -> None:
    if name not in listed(program):
        pytest.skip(f"this processor does not run {name}")
    result = run(program, name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(rf"kernel {name}: \d{{4,}} cases ok\n", result.stdout)
    assert result.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_kernel_agrees_with_float64(plain, name):
    check(plain, name)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_touches_no_byte_that_is_not_its_own(sanitized, name):
    check(sanitized, name)


def test_every_kernel_of_this_processor_is_tested(plain):
    assert set(listed(plain)) <= set(NAMES)
    assert listed(plain)[-1] == "scalar"


def test_kernel_that_does_not_run_here_is_refused_by_the_test_program(plain):
    result = run(plain, "abacus")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--list" in result.stderr
