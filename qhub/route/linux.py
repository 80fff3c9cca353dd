"""What Linux says of a machine in `/proc` and `/sys`; `root` is `/`, or a folder that looks like one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

#: Drivers of graphics cards and of NPUs → what qhub calls the accelerator.
_GPU_DRIVERS = {"i915": "gpu-intel", "xe": "gpu-intel", "amdgpu": "gpu-amd"}
_NPU_DRIVERS = {"intel_vpu": "npu-intel", "amdxdna": "npu-xdna2"}
#: PCI device ids of the first generation of AMD's NPU (Phoenix, Hawk Point); the same driver serves both.
_XDNA1 = "0x1502"
#: NVIDIA boards without an `nvidia-smi` that tells the compute capability.
_JETSONS = {"Orin": "cuda-8.7", "Xavier": "cuda-7.2", "Thor": "cuda-11.0"}
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "0x41": "arm", "0x61": "apple"}


def cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's entries of `/proc/cpuinfo`, keys in lower case, with the CPU's name as `model`.

    The kernel leaves out instruction sets whose registers it does not save (XCR0), so `flags` is what programs may use.
    """
    facts: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo")[:65536].splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip().lower(), value.strip())
    facts["model"] = facts.get("model name") or board(root) or facts.get("hardware") or "unknown CPU"
    return facts


def vendor(facts: Mapping[str, str]) -> str:
    """Who designed the CPU of `cpuinfo`; "" if unknown."""
    return _VENDORS.get(facts.get("vendor_id") or facts.get("cpu implementer", ""), "")


def board(root: Path) -> str:
    """What a single-board computer calls itself; "" on others."""
    return _text(root / "proc/device-tree/model").strip("\0\n ")


def memory_bytes(root: Path) -> int | None:
    """The memory that the kernel manages."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def memory_limit_bytes(root: Path) -> int | None:
    """What the control groups allow this process; None if there is no limit."""
    return _group_limit(root, "memory.max", "memory", "memory.limit_in_bytes")


def cpus(root: Path) -> frozenset[int]:
    """The logical processors that this process may run on."""
    for line in _text(root / "proc/self/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return frozenset(_numbers(line.partition(":")[2]))
    return frozenset()


def cpu_quota(root: Path) -> int | None:
    """How many processors' time the control groups allow, rounded down; None if there is no limit."""
    quota_us = _group_limit(root, "cpu.max", "cpu", "cpu.cfs_quota_us")
    return None if quota_us is None else max(1, quota_us // 100_000)


def physical_cores(root: Path, cpus: Iterable[int]) -> int:
    """How many cores `cpus` are: two threads of a core count once."""
    return len({_siblings(root, cpu) for cpu in cpus})


def performance_cpus(root: Path, cpus: frozenset[int]) -> frozenset[int]:
    """Those of `cpus` that are the fast ones of a hybrid CPU; all of them if it is none."""
    intel = frozenset(_numbers(_text(root / "sys/devices/cpu_core/cpus")))
    if intel & cpus:
        return intel & cpus
    capacity = {cpu: _text(_cpu(root, cpu) / "cpu_capacity").strip() for cpu in cpus}
    known = {cpu: int(text) for cpu, text in capacity.items() if text.isdigit()}
    # cores of one design differ a little in clock; the small cores of a phone have half the capacity or less
    return frozenset(cpu for cpu, value in known.items() if value > max(known.values()) / 2) or cpus


def hertz(root: Path, cpu: int, facts: Mapping[str, str]) -> float | None:
    """The highest clock of a processor, else the one that `/proc/cpuinfo` shows; None if neither is told."""
    highest = _text(_cpu(root, cpu) / "cpufreq/cpuinfo_max_freq").strip()
    if highest.isdigit():
        return float(highest) * 1e3
    shown = facts.get("cpu mhz", "")
    return float(shown) * 1e6 if shown.replace(".", "", 1).isdigit() else None


def accelerators(root: Path) -> tuple[str, ...]:
    """Graphics cards and NPUs with a driver; an NVIDIA card does not tell its compute capability here."""
    found = [name for word, name in _JETSONS.items() if word in board(root)]
    found += [_GPU_DRIVERS.get(_driver(card), "") for card in sorted((root / "sys/class/drm").glob("card*"))]
    for device in sorted((root / "sys/class/accel").glob("accel*")):
        name = _NPU_DRIVERS.get(_driver(device), "")
        found.append("npu-xdna1" if name == "npu-xdna2" and _text(device / "device/device").strip() == _XDNA1 else name)
    found += ["edgetpu" for _ in (root / "sys/class/apex").glob("apex_*")]
    return tuple(dict.fromkeys(name for name in found if name))


def group_limits(root: Path, group: str, name: str) -> Iterator[int]:
    """The limits in the files `name` on the way from `group` up to the control groups' `root`."""
    folder = root / group.lstrip("/")
    for level in (folder, *folder.parents):
        if level == root.parent:
            return
        text = _text(level / name).split()
        if text and text[0].isdigit() and int(text[0]) < 1 << 62:  # "max" and version 1's huge number mean no limit
            yield int(text[0])


def _group_limit(root: Path, v2_name: str, v1_controller: str, v1_name: str) -> int | None:
    values: list[int] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            values += group_limits(root / "sys/fs/cgroup", group, v2_name)
        elif v1_controller in controllers.split(","):
            values += group_limits(root / "sys/fs/cgroup" / v1_controller, group, v1_name)
    return min(values, default=None)


def _cpu(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _siblings(root: Path, cpu: int) -> str:
    return _text(_cpu(root, cpu) / "topology/thread_siblings_list").strip() or str(cpu)


def _driver(device: Path) -> str:
    link = device / "device/driver"
    return link.resolve().name if link.exists() else ""


def _numbers(text: str) -> Iterator[int]:
    """The numbers in a list such as `0-3,8`."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last or first) + 1)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
