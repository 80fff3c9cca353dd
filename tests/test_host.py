"""This machine as a target: read in milliseconds, measured when asked."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

import pytest

from qhub.route import host, linux
from qhub.route.registry import load_registry

XEON = "flags : fpu sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
PI5 = "Features : fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


LAPTOP = {
    "proc/cpuinfo": "vendor_id : GenuineIntel\nmodel name : Intel(R) Core(TM) Ultra 7 258V\nflags : fpu avx avx2 fma f16c avx_vnni\n",
    "proc/meminfo": "MemTotal:       16384000 kB\nMemFree: 1 kB\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed:\t3f\nCpus_allowed_list:\t0-5\n",
    "sys/devices/cpu_core/cpus": "0-3\n",
    "sys/devices/cpu_atom/cpus": "4-5\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "4800000\n",
    **{f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n" for cpu in range(4)},
}
REGISTRY = load_registry().targets


def machine(root, files):
    """`root` as the `/` of a machine with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def driver(root, folder, name, device="0x0000"):
    """A device with a driver, as sysfs shows it: `driver` is a link to a folder named after it."""
    machine(root, {f"{folder}/device/device": f"{device}\n", f"sys/bus/pci/drivers/{name}/bind": ""})
    (root / folder / "device/driver").symlink_to(root / "sys/bus/pci/drivers" / name)


def nvidia_smi(monkeypatch, folder, does):
    """An `nvidia-smi` that does this, and the file in which it counts how often."""
    tool, count = folder / "nvidia-smi", folder / "count"
    tool.write_text(f"#!/bin/sh\necho asked >> {count}\n{does}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return count


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


def test_the_name_of_the_processor_is_part_of_what_host_is():
    assert host.cpu_model() in host.detect().summary


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
        ("aarch64", "Features : fp asimd evtstrm crc32 cpuid", "neon"),
        ("aarch64", "Features : fp asimd asimdhp asimddp i8mm bf16 sve sve2", "neon fp16 dotprod i8mm bf16 sve sve2"),
    ],
    ids=["Sapphire Rapids", "an old PC", "Raspberry Pi 5", "Raspberry Pi 4", "Graviton 4"],
)
def test_instruction_sets_are_read_from_cpuinfo(tmp_path, arch, line, isa):
    machine(tmp_path, {"proc/cpuinfo": f"processor : 0\n{line}\n\nprocessor : 1\nflags : something else\n"})
    assert host.isa_of(arch, linux.cpuinfo(tmp_path)) == tuple(isa.split())


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
    machine(tmp_path, files)
    assert min(linux.group_limits(tmp_path, group, "memory.max"), default=None) == limit


# A container: version 1 has a folder for each kind of limit, version 2 one for all.
@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/memory.max": "4000000000", "sys/fs/cgroup/box/cpu.max": "250000 100000"},
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "4000000000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "250000",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_container_is_told_what_it_may_use_and_not_what_there_is(tmp_path, files):
    target = host.linux_target(machine(tmp_path, {**LAPTOP, **files}), "x86_64")
    assert (target.cores, target.memory_bytes, target.usable_memory_bytes) == (2, 16777216000, 3600000000)


def test_a_hybrid_laptop_is_its_fast_cores_its_gpu_and_its_npu(tmp_path):
    root = machine(tmp_path, LAPTOP)
    driver(root, "sys/class/drm/card1", "xe")
    driver(root, "sys/class/accel/accel0", "intel_vpu")
    target = host.linux_target(root, "x86_64")
    assert target.summary.startswith("this machine: Intel(R) Core(TM) Ultra 7 258V")
    assert (target.vendor, target.isa) == ("intel", ("avx", "avx2", "fma", "f16c", "avx_vnni"))
    assert target.accelerators == ("gpu-intel", "npu-intel")
    assert target.cores == 2, "two fast cores of two threads each; the two small ones are left out"
    assert target.notes == ("hybrid cores: 2 fast ones are meant, use those for decoding",)
    assert target.usable_memory_bytes == int(16777216000 * 0.9)
    assert (target.int8_ops_per_s.value, target.fp16_flops_per_s.value) == (1.23e12, 3.07e11)
    assert target.int8_ops_per_s.source == "derived: 2 cores x 4.8 GHz x 2 VPDPBUSD of 32 MAC, theoretical peak"


# The kernel's way to write a set of processors.
@pytest.mark.parametrize(
    ("text", "found"),
    [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0,2-3,7", {0, 2, 3, 7}), ("", set()), ("none", set())],
)
def test_lists_of_processors_are_read(tmp_path, text, found):
    machine(tmp_path, {"proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{text}\n"})
    assert linux.cpus(tmp_path) == found


# A quota is processor time per 0.1 s of time; less than one processor is one.
@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 2), ("max 100000", 2)])
def test_a_quota_of_processor_time_limits_the_cores(tmp_path, quota, cores):
    files = {"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": f"{quota}\n"}
    assert host.linux_target(machine(tmp_path, {**LAPTOP, **files}), "x86_64").cores == cores


def test_only_the_processors_that_this_process_may_use_count(tmp_path):
    target = host.linux_target(machine(tmp_path, {**LAPTOP, "proc/self/status": "Cpus_allowed_list:\t4-5\n"}), "x86_64")
    assert (target.cores, target.notes) == (2, ()), "the small cores are all it has"


def test_a_raspberry_pi_calls_itself_by_its_name(tmp_path):
    files = {
        "proc/cpuinfo": f"processor : 0\n{PI5}\nCPU implementer : 0x41\n",
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/self/status": "Cpus_allowed_list:\t0-3\n",
        "proc/meminfo": "MemTotal: 8000000 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
        **{f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": "1024\n" for cpu in range(4)},
    }
    target = host.linux_target(machine(tmp_path, files), "aarch64")
    assert "Raspberry Pi 5 Model B Rev 1.0" in target.summary
    assert (target.vendor, target.cores, target.accelerators) == ("arm", 4, ())
    assert target.int8_ops_per_s.value == REGISTRY["raspberry-pi-5"].int8_ops_per_s.value
    assert target.fp16_flops_per_s.value == REGISTRY["raspberry-pi-5"].fp16_flops_per_s.value


# Drivers and device ids of accelerators; a driver that qhub does not know is none.
@pytest.mark.parametrize(
    ("folder", "name", "device", "accelerators"),
    [
        ("sys/class/drm/card0", "i915", "0x56a0", ("gpu-intel",)),
        ("sys/class/drm/card0", "amdgpu", "0x744c", ("gpu-amd",)),
        ("sys/class/drm/card0", "virtio_gpu", "0x1050", ()),
        ("sys/class/accel/accel0", "intel_vpu", "0x643e", ("npu-intel",)),
        ("sys/class/accel/accel0", "amdxdna", "0x1502", ("npu-xdna1",)),
        ("sys/class/accel/accel0", "amdxdna", "0x17f0", ("npu-xdna2",)),
        ("sys/class/apex/apex_0", "apex", "0x089a", ("edgetpu",)),
    ],
)
def test_accelerators_are_known_by_their_driver(tmp_path, folder, name, device, accelerators):
    driver(tmp_path, folder, name, device)
    assert linux.accelerators(tmp_path) == accelerators


@pytest.mark.parametrize(
    ("name", "accelerator"), [("NVIDIA Jetson Orin Nano Developer Kit", "cuda-8.7"), ("Jetson AGX Xavier", "cuda-7.2")]
)
def test_a_jetson_is_known_by_its_name(tmp_path, name, accelerator):
    assert linux.accelerators(machine(tmp_path, {"proc/device-tree/model": f"{name}\0"})) == (accelerator,)


def test_the_small_cores_of_a_phone_are_left_out(tmp_path):
    capacities = [300, 300, 790, 790, 790, 1024]
    machine(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": str(value) for cpu, value in enumerate(capacities)})
    assert linux.performance_cpus(tmp_path, frozenset(range(6))) == {2, 3, 4, 5}


# AMX needs the kernel's consent: without it the tiles may not be touched, whatever the CPU could.
@pytest.mark.parametrize(("tiles", "best"), [(True, "AMX"), (False, "VPDPBUSD")])
def test_amx_counts_only_where_a_process_may_use_it(tmp_path, tiles, best):
    files = {"proc/cpuinfo": f"{XEON}\ncpu MHz : 2000.0\n", "proc/self/status": "Cpus_allowed_list: 0-55\n"}
    target = host.linux_target(machine(tmp_path, files), "x86_64", tiles=tiles)
    assert ("amx_int8" in target.isa) == tiles
    assert "avx512_vnni" in target.isa
    assert best in target.int8_ops_per_s.source


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="a question to the Linux kernel of an x86 machine")
def test_the_kernel_is_asked_about_amx_and_nothing_is_asked_for():
    assert host._may_use_tiles() in (True, False)
    if "amx_tile" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        assert not host._may_use_tiles()


def test_a_machine_that_says_nothing_is_unknown_and_no_error(tmp_path):
    target = host.linux_target(tmp_path, "x86_64")
    assert (target.isa, target.accelerators, target.vendor, target.notes) == ((), (), "", ())
    facts = (target.cores, target.memory_bytes, target.usable_memory_bytes, target.int8_ops_per_s, target.fp16_flops_per_s)
    assert facts == (None,) * 5


def test_a_mac_is_what_sysctl_says():
    facts = {"model": "Apple M1", "hw.memsize": "17179869184", "hw.physicalcpu": "8", "FEAT_FP16": "1", "FEAT_DotProd": "1"}
    target = host.macos_target(facts, "aarch64")
    registered = REGISTRY["apple-m1"]
    for fact in ("os", "arch", "vendor", "isa", "accelerators", "cores", "memory_bytes"):
        assert getattr(target, fact) == getattr(registered, fact), fact
    assert target.usable_memory_bytes == pytest.approx(registered.usable_memory_bytes, rel=1e-6)


def test_a_mac_with_an_intel_processor_has_no_neural_engine():
    facts = {"model": "Intel(R) Core(TM) i7", "flags": "fma avx2 avx"}
    target = host.macos_target(facts, "x86_64")
    assert (target.vendor, target.accelerators, target.isa) == ("intel", ("metal",), ("avx", "avx2", "fma"))


def test_graphics_cards_are_asked_once_and_remembered(monkeypatch, tmp_path):
    if host.detect().accelerators:
        pytest.skip("this machine has an accelerator of its own")
    count = nvidia_smi(monkeypatch, tmp_path, "printf '8.9\\n8.9\\n'")
    assert [host.detect().accelerators for _ in range(3)] == [("cuda-8.9",)] * 3
    assert count.read_text(encoding="utf-8") == "asked\n"


def test_a_broken_nvidia_smi_means_no_graphics_card(monkeypatch, tmp_path):
    nvidia_smi(monkeypatch, tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert host._cuda() == ()


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch):
    assert host.cache_file() == Path(os.environ["XDG_CACHE_HOME"]) / "qhub" / "host.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert host.cache_file().is_relative_to(Path.home())
