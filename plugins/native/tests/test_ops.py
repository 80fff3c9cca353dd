"""Norms, gates, rotations, float products and attention of every instruction set, against float64 in a C++ program."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

NAMES = ("avx512", "avx2", "scalar") if platform.machine() == "x86_64" else ("neon", "scalar")
ABSENT = [program for program in ("c++", "cmake") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not on this machine: {', '.join(ABSENT)}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [(), ("-DQHUB_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")], ids=["plain", "sanitized"])
def test_operations_agree_with_float64(name, options, native_program):
    program = native_program("ops_test", *options)
    if name not in subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split():
        pytest.skip(f"this processor does not run {name}")
    result = subprocess.run([program, name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(rf"ops {name}: \d{{4,}} numbers ok\n", result.stdout)
