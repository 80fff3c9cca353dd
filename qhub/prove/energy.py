"""Joules of the processor packages, from the counters that Linux shows of Intel's and AMD's RAPL; often readable by root only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """What one package's counter showed, and where it starts again from 0; both in microjoules."""

    value_uj: int
    range_uj: int


def counters(root: Path = ROOT) -> Mapping[str, Counter]:
    """The packages' counters now; empty where there are none or they cannot be read. Parts of a package are not counted twice."""
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            found[zone.name] = Counter(_number(zone / "energy_uj"), _number(zone / "max_energy_range_uj"))
        except (OSError, ValueError):
            return {}
    return found


def joules(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> float | None:
    """What was used between two looks; None if it was not measured. A counter may have started again once."""
    if not before or before.keys() != after.keys():
        return None
    return sum(_used(before[name], after[name]) for name in before) / 1e6


def _used(before: Counter, after: Counter) -> int:
    used = after.value_uj - before.value_uj
    return used if used >= 0 else used + after.range_uj


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
