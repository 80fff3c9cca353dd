"""This machine as a `Target`: instruction sets, cores, memory, accelerators, and its memory bandwidth where it was measured.

Reading takes milliseconds. The bandwidth takes half a second to measure, so only `measure_bandwidth` does, and keeps the
result in the user's cache folder under the name of the CPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

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
_USABLE_SHARE = {"macos": 0.67}
_MEASURED_BYTES = 256 << 20


def detect() -> Target:
    """This machine as the target `host`; the bandwidth is there only if it was measured before."""
    system = _SYSTEMS.get(sys.platform, sys.platform)
    arch = _MACHINES.get(platform.machine(), platform.machine())
    facts = _sysctl() if system == "macos" else _cpuinfo()
    memory = _memory_bytes(facts)
    model = facts["model"]
    return Target(
        name="host",
        summary=f"this machine: {model}, {platform.system()} {arch}",
        os=system,
        arch=arch,
        isa=isa_of(arch, facts),
        accelerators=_accelerators(system, arch),
        cores=_cores(),
        memory_bytes=memory,
        usable_memory_bytes=_usable_bytes(memory, system),
        bandwidth_bytes_per_s=_cached(model),
    )


def isa_of(arch: str, facts: Mapping[str, str]) -> tuple[str, ...]:
    """The instruction sets in `facts` (`flags` and `Features` of /proc/cpuinfo, `FEAT_…` of sysctl) by qhub's names."""
    if arch == "x86_64":
        have = set(facts.get("flags", "").lower().split())
        return tuple(name for name in _X86 if name in have)
    linux = set(facts.get("features", "").split())
    names = [ours for theirs, ours in _ARM.items() if theirs in linux]
    apple = [ours for theirs, ours in _APPLE.items() if facts.get(theirs) == "1"]
    return tuple(names or (["neon", *apple] if apple else []))


def measure_bandwidth(seconds: float = 0.5) -> Fact:
    """Read 256 MiB over and over on all cores, and keep the best pass in the cache folder.

    Takes about `seconds`; imports numpy.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = _cores() or 1
    parts = np.array_split(np.ones(_MEASURED_BYTES // 4, np.float32), threads)
    best, stop = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < stop:
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    source = f"measured on this machine: {threads} threads read {_MEASURED_BYTES >> 20} MiB with numpy"
    fact = Fact(round(_MEASURED_BYTES / best), source, date.today().isoformat())
    _store(cpu_model(), fact)
    return fact


def cpu_model() -> str:
    """The name that this machine's processor gives itself."""
    return (_sysctl() if sys.platform == "darwin" else _cpuinfo())["model"]


def cache_file() -> Path:
    """Where measurements of this machine are kept."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "qhub" / "host.json"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qhub" / "host.json"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "qhub" / "host.json"


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The first processor's entries; enough, since a program may run on any core."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(65536)
    except OSError:
        return {"model": platform.processor() or "unknown CPU"}
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip().lower(), value.strip())
    facts["model"] = facts.get("model name") or _device_tree_model() or facts.get("hardware") or "unknown CPU"
    return facts


def _device_tree_model() -> str:
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n ")
    except OSError:
        return ""


def _sysctl() -> dict[str, str]:
    text = _output(["sysctl", "machdep.cpu", "hw.memsize", "hw.optional"])
    facts = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    names = {key.removeprefix("hw.optional.arm."): value for key, value in facts.items()}
    flags = " ".join(facts.get(f"machdep.cpu.{key}", "") for key in ("features", "leaf7_features"))
    flags = flags.lower().replace("avx1.0", "avx")
    model = facts.get("machdep.cpu.brand_string", "unknown CPU")
    return {**names, "flags": flags, "model": model, "memory": facts.get("hw.memsize", "")}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _cores() -> int | None:
    """Cores that this process may use, which is fewer than the machine has in a container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_value("cpu.max", "cpu", "cpu.cfs_quota_us")
    return count if quota is None or count is None else max(1, min(count, quota // 100_000))


def _memory_bytes(facts: Mapping[str, str]) -> int | None:
    if facts.get("memory", "").isdigit():
        return int(facts["memory"])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _usable_bytes(memory: int | None, system: str) -> int | None:
    if memory is None:
        return None
    limit = _cgroup_value("memory.max", "memory", "memory.limit_in_bytes")
    allowed = memory if limit is None else min(memory, limit)
    return int(allowed * _USABLE_SHARE.get(system, 0.9))


def _cgroup_value(v2_name: str, v1_controller: str, v1_name: str) -> int | None:
    """The smallest limit on the way from this process's control group up to the root; None if there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values: list[int] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            values += _limits(Path("/sys/fs/cgroup"), group, v2_name)
        elif v1_controller in controllers.split(","):
            values += _limits(Path("/sys/fs/cgroup") / v1_controller, group, v1_name)
    return min(values, default=None)


def _limits(root: Path, group: str, name: str) -> Iterable[int]:
    folder = root / group.lstrip("/")
    for level in (folder, *folder.parents):
        if level == root.parent:
            return
        try:
            text = (level / name).read_text(encoding="ascii").split()[0]
        except (OSError, IndexError):
            continue
        if text.isdigit() and int(text) < 1 << 62:  # "max" and v1's huge number mean no limit
            yield int(text)


def _accelerators(system: str, arch: str) -> tuple[str, ...]:
    if system == "macos":
        return ("metal", "ane") if arch == "aarch64" else ("metal",)
    if "Orin" in _device_tree_model():  # a Jetson has no nvidia-smi that tells
        return ("cuda-8.7",)
    return tuple(dict.fromkeys(f"cuda-{capability}" for capability in _cuda_capabilities()))


def _cuda_capabilities() -> list[str]:
    """Compute capability of each NVIDIA GPU. Asked once per driver: `nvidia-smi` can take a second."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    version = Path("/proc/driver/nvidia/version")
    key = f"nvidia {version.read_text(encoding='utf-8').splitlines()[0]}" if version.is_file() else f"nvidia {tool}"
    known = _read_cache().get(key)
    if isinstance(known, list):
        return [str(item) for item in known]
    text = _output([tool, "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = re.findall(r"^\d+\.\d+$", text, re.MULTILINE)
    if found:
        _write_cache({key: found})
    return found


def _cached(model: str) -> Fact | None:
    entry = _read_cache().get(f"{model} x{_cores()}")
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), (int, float)):
        return None
    return Fact(float(entry["value"]), str(entry.get("source", "")), str(entry.get("date", "")))


def _store(model: str, fact: Fact) -> None:
    _write_cache({f"{model} x{_cores()}": {"value": fact.value, "source": fact.source, "date": fact.date}})


def _read_cache() -> dict[str, Any]:
    try:
        data = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_cache(entries: Mapping[str, Any]) -> None:
    """Keep `entries`; a cache that cannot be written is not worth an error."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({**_read_cache(), **entries}, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError:
        return
