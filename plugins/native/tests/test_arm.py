"""The Arm kernels, cross-compiled and run by an emulator: each on the oldest processor that it is for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {"cmake": "cmake", COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
ABSENT = [package for program, package in PACKAGES.items() if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"needs Debian's {' and '.join(ABSENT)}: apt-get install {' '.join(ABSENT)}")

# What each processor runs, best first: the Raspberry Pi 4's, the Raspberry Pi 5's, and all that the emulator knows.
PROCESSORS = {
    "cortex-a72": ["neon", "scalar"],
    "cortex-a76": ["neon_dotprod", "neon", "scalar"],
    "max": ["neon_i8mm", "neon_dotprod", "neon", "scalar"],
}


OPTIONS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)


@pytest.fixture(scope="module")
def program(native_program) -> Path:
    return native_program("kernels_test", *OPTIONS)


def run(program: Path, processor: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EMULATOR, "-cpu", processor, program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processor_runs_just_the_kernels_it_has_instructions_for(program, processor):
    assert run(program, processor, "--list").stdout.split() == PROCESSORS[processor]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_best_kernel_of_the_processor_agrees_with_float64(program, processor):
    best = PROCESSORS[processor][0]
    result = run(program, processor, "--quick", best, "scalar")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(rf"kernel {best}: \d{{3,}} cases ok\nkernel scalar: \d{{3,}} cases ok\n", result.stdout)


def test_kernel_of_a_newer_processor_is_refused(program):
    assert run(program, "cortex-a72", "neon_dotprod").returncode == 2


def test_vector_operations_agree_with_float64(native_program):
    result = run(native_program("ops_test", *OPTIONS), "cortex-a72")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"ops neon: \d{4,} numbers ok\nops scalar: \d{4,} numbers ok\n", result.stdout)
