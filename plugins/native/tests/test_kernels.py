"""Every kernel that this processor runs, against float64 in a C++ program, plainly and with the sanitizers."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

KERNELS = {
    "x86_64": ("amx_int8", "amx_int8_emulated", "avx512_vnni", "avx_vnni", "avx2", "scalar"),
    "aarch64": ("neon_i8mm", "neon_dotprod", "neon", "scalar"),
}
NAMES = KERNELS.get(platform.machine(), ("scalar",))
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


def check(program: Path, name: str, *options: str) -> None:
    if name not in listed(program):
        pytest.skip(f"this processor does not run {name}")
    result = run(program, *options, name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(rf"kernel {name}: \d{{3,}} cases ok\n", result.stdout)
    assert result.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_kernel_agrees_with_float64(plain, name):
    check(plain, name)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_touches_no_byte_that_is_not_its_own(sanitized, name):
    check(sanitized, name, "--quick")


def test_every_kernel_of_this_processor_is_tested(plain):
    assert set(listed(plain)) <= set(NAMES)
    assert listed(plain)[-1] == "scalar"


def tile_config(step: int) -> bytes:
    """What LDTILECFG reads: palette 1; four tiles of sums, two of activations with `step` bytes a row, two of weights."""
    row_bytes = [64] * 4 + [step] * 2 + [64] * 2 + [0] * 8
    rows = [16] * 6 + [step // 4] * 2 + [0] * 8
    return struct.pack("<2B14x16H16B", 1, 0, *row_bytes, *rows)


# gcc 12's own intrinsic says that 8 of these 64 bytes are read, and drops the stores of the others.
def test_configuration_of_the_tiles_is_complete_in_the_program(plain):
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs an x86-64 compiler and objdump")
    code = subprocess.run(["objdump", "-d", plain], capture_output=True, text=True, check=True).stdout
    places = [int(found, 16) for found in re.findall(r"ldtilecfg .*# ([0-9a-f]+) ", code)]
    assert len(places) == code.count("ldtilecfg") == 2
    found = set()
    for place in places:
        command = ["objdump", "-s", "-j", ".rodata", f"--start-address={place}", f"--stop-address={place + 64}", plain]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.add(bytes.fromhex("".join("".join(line.split()[1:5]) for line in dump.splitlines() if line.startswith(" "))))
    assert found == {tile_config(32), tile_config(64)}


def test_kernel_that_does_not_run_here_is_refused_by_the_test_program(plain):
    result = run(plain, "abacus")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--list" in result.stderr
