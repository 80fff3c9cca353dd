"""This machine as a target: read in milliseconds, measured when asked."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from qhub.route import host

XEON = "flags : fpu sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
PI5 = "Features : fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_host_says_what_a_target_must_say():
    target = host.detect()
    assert target.name == "host"
    assert target.os in ("linux", "macos", "windows")
    assert target.arch in ("x86_64", "aarch64")
    assert 0 < target.usable_memory_bytes < target.memory_bytes
    assert 1 <= target.cores <= os.cpu_count()
    assert target.bandwidth_bytes_per_s is None


def test_detection_takes_less_than_30_milliseconds():
    times = []
    for _ in range(5):
        started = time.perf_counter()
        host.detect()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.03


def test_a_measured_bandwidth_is_remembered():
    fact = host.measure_bandwidth(seconds=0.05)
    assert 5e8 < fact.value < 5e12
    assert "measured on this machine" in fact.source
    assert host.detect().bandwidth_bytes_per_s == fact


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"x": 1}'], ids=["empty", "not JSON", "a list", "another machine"])
def test_a_useless_cache_is_ignored_and_replaced(text):
    host.cache_file().parent.mkdir(parents=True)
    host.cache_file().write_text(text, encoding="utf-8")
    assert host.detect().bandwidth_bytes_per_s is None
    fact = host.measure_bandwidth(seconds=0.01)
    assert host.detect().bandwidth_bytes_per_s == fact
    assert isinstance(json.loads(host.cache_file().read_text(encoding="utf-8")), dict)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be", encoding="utf-8")
    assert host.measure_bandwidth(seconds=0.01).value > 0
    assert host.detect().bandwidth_bytes_per_s is None


# /proc/cpuinfo of known machines → instruction sets by qhub's names.
@pytest.mark.parametrize(
    ("arch", "line", "isa"),
    [
        ("x86_64", XEON, "avx avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16"),
        ("x86_64", "flags : fpu sse2", ""),
        ("aarch64", PI5, "neon fp16 dotprod"),
        ("aarch64", "Features : fp asimd asimdhp asimddp i8mm bf16 sve sve2", "neon fp16 dotprod i8mm bf16 sve sve2"),
    ],
    ids=["Sapphire Rapids", "an old PC", "Raspberry Pi 5", "Graviton 4"],
)
def test_instruction_sets_are_read_from_cpuinfo(tmp_path, arch, line, isa):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{line}\n\nprocessor : 1\nflags : something else\n", encoding="utf-8")
    assert host.isa_of(arch, host._cpuinfo(path)) == tuple(isa.split())


def test_apples_features_are_read_from_sysctl():
    facts = {"FEAT_FP16": "1", "FEAT_DotProd": "1", "FEAT_I8MM": "0", "FEAT_BF16": "0"}
    assert host.isa_of("aarch64", facts) == ("neon", "fp16", "dotprod")


# Control groups: a limit anywhere on the way up to the root counts; "max" and the huge number of version 1 are none.
@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("/a/b", {"a/b/memory.max": "500", "a/memory.max": "1000"}, 500),
        ("/", {"memory.max": "700"}, 700),
        ("/a", {"a/memory.max": "9223372036854771712"}, None),
        ("/a", {}, None),
    ],
)
def test_the_smallest_limit_of_the_control_groups_counts(tmp_path, group, files, limit):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    assert min(host._limits(tmp_path, group, "memory.max"), default=None) == limit


def test_graphics_cards_are_asked_once_and_remembered(monkeypatch, tmp_path):
    if host._accelerators("linux", "x86_64"):
        pytest.skip("this machine has an accelerator of its own")
    tool = tmp_path / "nvidia-smi"
    count = tmp_path / "count"
    tool.write_text(f"#!/bin/sh\necho asked >> {count}\nprintf '8.9\\n8.9\\n'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [host.detect().accelerators for _ in range(3)] == [("cuda-8.9",)] * 3
    assert count.read_text(encoding="utf-8") == "asked\n"


def test_a_broken_nvidia_smi_means_no_graphics_card(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' \nexit 9\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert host._cuda_capabilities() == []


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch):
    assert host.cache_file() == Path(os.environ["XDG_CACHE_HOME"]) / "qhub" / "host.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert host.cache_file().is_relative_to(Path.home())
