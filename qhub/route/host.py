"""This machine as a `Target`: instruction sets, cores, memory, accelerators, and its memory bandwidth where it was measured.

Reading takes milliseconds. The bandwidth takes half a second to measure, so only `measure_bandwidth` does, and keeps the
result in the user's cache folder under the name of the CPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from qhub.route import linux
from qhub.route.peaks import FP16, INT8, peak
from qhub.route.usercache import cache_path, read_cache, write_cache
from qhub.types import Fact, Target

#: What `/proc/cpuinfo` says (after the kernel removed what it does not support) → what qhub says.
_X86 = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
)  # fmt: skip
_ARM = {
    "asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2",
    "sme": "sme", "sme2": "sme2",
}  # fmt: skip
_APPLE = {
    "FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "FEAT_SME": "sme",
    "FEAT_SME2": "sme2",
}  # fmt: skip
_MACHINES = {"arm64": "aarch64", "amd64": "x86_64", "AMD64": "x86_64", "ARM64": "aarch64"}
_SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows"}
#: What is left for a model where nothing else limits it; macOS lets the GPU wire about this much of a small machine.
_USABLE_SHARE, _USABLE_SHARE_MACOS = 0.9, 0.67
_MEASURED_BYTES = 256 << 20
_CACHE = "host.json"
_ROOT = Path("/")
#: arch_prctl: which extended registers a process may ask for; AMX's tiles are bits 17 and 18.
_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_SUPP, _TILES = 158, 0x1021, 0b11 << 17


def detect() -> Target:
    """This machine as the target `host`; the bandwidth is there only if it was measured before."""
    arch = _MACHINES.get(platform.machine(), platform.machine())
    if sys.platform == "linux":
        tiles = "amx_tile" not in linux.cpuinfo(_ROOT).get("flags", "") or _may_use_tiles()
        return linux_target(_ROOT, arch, tiles=tiles, cuda=_cuda())
    if sys.platform == "darwin":
        return macos_target(_sysctl(), arch)
    model = platform.processor() or "unknown CPU"
    system = _SYSTEMS.get(sys.platform, sys.platform)
    return Target("host", _summary(model, arch), system, arch, cores=os.cpu_count(), bandwidth_bytes_per_s=_known(model))


def linux_target(root: Path, arch: str, *, tiles: bool = True, cuda: tuple[str, ...] = ()) -> Target:
    """The Linux machine whose `/proc` and `/sys` are below `root`.

    `tiles`: whether a process may use AMX's registers; `cuda`: the accelerators that only NVIDIA's tool tells.
    """
    facts = linux.cpuinfo(root)
    isa = tuple(name for name in isa_of(arch, facts) if tiles or not name.startswith("amx"))
    allowed, fast, cores = _cores(root)
    memory = linux.memory_bytes(root)
    limits = [limit for limit in (memory, linux.memory_limit_bytes(root)) if limit is not None]
    hertz = linux.hertz(root, min(fast, default=0), facts)
    return Target(
        name="host",
        summary=_summary(facts["model"], arch),
        os="linux",
        arch=arch,
        isa=isa,
        accelerators=tuple(dict.fromkeys((*cuda, *linux.accelerators(root)))),
        cores=cores,
        memory_bytes=memory,
        usable_memory_bytes=int(min(limits) * _USABLE_SHARE) if limits else None,
        bandwidth_bytes_per_s=_known(facts["model"]),
        int8_ops_per_s=peak(INT8, isa, cores, hertz),
        fp16_flops_per_s=peak(FP16, isa, cores, hertz),
        notes=() if fast == allowed else (f"hybrid cores: {cores} fast ones are meant, use those for decoding",),
        vendor=linux.vendor(facts),
    )


def macos_target(facts: Mapping[str, str], arch: str) -> Target:
    """The Mac that `sysctl` says these facts of."""
    memory = int(facts["hw.memsize"]) if facts.get("hw.memsize", "").isdigit() else None
    cores = facts.get("hw.physicalcpu", "")
    silicon = arch == "aarch64"
    return Target(
        name="host",
        summary=_summary(facts["model"], arch),
        os="macos",
        arch=arch,
        isa=isa_of(arch, facts),
        accelerators=("metal", "ane") if silicon else ("metal",),
        cores=int(cores) if cores.isdigit() else os.cpu_count(),
        memory_bytes=memory,
        usable_memory_bytes=None if memory is None else int(memory * _USABLE_SHARE_MACOS),
        bandwidth_bytes_per_s=_known(facts["model"]),
        vendor="apple" if silicon else "intel",
    )


def isa_of(arch: str, facts: Mapping[str, str]) -> tuple[str, ...]:
    """The instruction sets in `facts` (`flags` and `Features` of /proc/cpuinfo, `FEAT_…` of sysctl) by qhub's names."""
    if arch == "x86_64":
        have = set(facts.get("flags", "").lower().split())
        return tuple(name for name in _X86 if name in have)
    told = set(facts.get("features", "").split())
    names = [ours for theirs, ours in _ARM.items() if theirs in told]
    apple = [ours for theirs, ours in _APPLE.items() if facts.get(theirs) == "1"]
    return tuple(names or (["neon", *apple] if apple else []))


def measure_bandwidth(seconds: float = 0.5) -> Fact:
    """Read 256 MiB over and over on all cores, and keep the best pass in the cache folder.

    Takes about `seconds`; imports numpy.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = fast_cores()
    parts = np.array_split(np.ones(_MEASURED_BYTES // 4, np.float32), threads)
    best, stop = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < stop:
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    source = f"measured on this machine: {threads} threads read {_MEASURED_BYTES >> 20} MiB with numpy"
    fact = Fact(round(_MEASURED_BYTES / best), source, date.today().isoformat())
    _remember(_key(cpu_model()), {"value": fact.value, "source": fact.source, "date": fact.date})
    return fact


def cpu_model() -> str:
    """The name that this machine's processor gives itself."""
    if sys.platform == "linux":
        return linux.cpuinfo(_ROOT)["model"]
    return _sysctl()["model"] if sys.platform == "darwin" else platform.processor() or "unknown CPU"


def cache_file() -> Path:
    """Where measurements of this machine are kept."""
    return cache_path(_CACHE)


def _summary(model: str, arch: str) -> str:
    return f"this machine: {model}, {platform.system()} {arch}"


def _cores(root: Path) -> tuple[frozenset[int], frozenset[int], int | None]:
    """The processors that this process may use, the fast ones of them, and how many cores those are within its quota."""
    allowed = linux.cpus(root)
    fast = linux.performance_cpus(root, allowed)
    count, quota = linux.physical_cores(root, fast), linux.cpu_quota(root)
    return allowed, fast, (count if quota is None else min(count, quota)) or None


def fast_cores() -> int:
    """How many physical cores this process may use, only the fast ones where there are two kinds: as many threads are worth having."""
    return (_cores(_ROOT)[2] if sys.platform == "linux" else os.cpu_count()) or 1


def _may_use_tiles() -> bool:
    """Whether the kernel grants AMX's registers to a process that asks. Nothing is asked for here."""
    import ctypes

    supported = ctypes.c_uint64(0)
    failed = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_SUPP, ctypes.byref(supported))
    return not failed and supported.value & _TILES == _TILES


def _sysctl() -> dict[str, str]:
    text = _output(["sysctl", "machdep.cpu", "hw.memsize", "hw.physicalcpu", "hw.optional"])
    facts = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    names = {key.removeprefix("hw.optional.arm."): value for key, value in facts.items()}
    flags = " ".join(facts.get(f"machdep.cpu.{key}", "") for key in ("features", "leaf7_features"))
    return {**names, "flags": flags.lower().replace("avx1.0", "avx"), "model": facts.get("machdep.cpu.brand_string", "unknown CPU")}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _cuda() -> tuple[str, ...]:
    """The compute capability of each NVIDIA GPU. Asked once per driver: `nvidia-smi` can take a second."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    version = Path("/proc/driver/nvidia/version")
    key = f"nvidia {version.read_text(encoding='utf-8').splitlines()[0]}" if version.is_file() else f"nvidia {tool}"
    found = read_cache(_CACHE).get(key)
    if not isinstance(found, list):
        text = _output([tool, "--query-gpu=compute_cap", "--format=csv,noheader"])
        found = re.findall(r"^\d+\.\d+$", text, re.MULTILINE)
        if found:
            _remember(key, found)
    return tuple(f"cuda-{capability}" for capability in found)


def _key(model: str) -> str:
    return f"{model} x{fast_cores()}"


def _known(model: str) -> Fact | None:
    entry = read_cache(_CACHE).get(_key(model))
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), (int, float)):
        return None
    return Fact(float(entry["value"]), str(entry.get("source", "")), str(entry.get("date", "")))


def _remember(key: str, value: object) -> None:
    write_cache(_CACHE, {**read_cache(_CACHE), key: value})
