"""Peak rates of a CPU from its instruction sets: operations per cycle × cores × clock. An upper bound, and said to be one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from qhub.types import Fact

#: Instruction set → multiply-accumulates per cycle and core, and by which instructions; best first.
INT8 = {
    "amx_int8": (1024, "AMX"),
    "avx512_vnni": (128, "2 VPDPBUSD of 64 MAC"),
    "avx_vnni": (64, "2 VPDPBUSD of 32 MAC"),
    "avx2": (16, "VPMADDUBSW and VPMADDWD"),
    "i8mm": (64, "2 SMMLA of 32 MAC"),
    "dotprod": (32, "2 SDOT of 16 MAC"),
    "neon": (8, "SMULL and SADALP"),
}
FP16 = {
    "amx_bf16": (512, "AMX, bf16"),
    "avx512f": (32, "2 FMA of 16, computed in fp32"),
    "avx2": (16, "2 FMA of 8, computed in fp32"),
    "fp16": (16, "2 FMLA of 8 fp16"),
    "neon": (4, "1 FMLA of 4, computed in fp32"),
}


def peak(table: dict[str, tuple[int, str]], isa: Sequence[str], cores: int | None, hertz: float | None) -> Fact | None:
    """Operations per second of `cores` at `hertz` with the best of `isa`; a multiply-accumulate counts as two. None if unknown."""
    best = next((name for name in table if name in isa), None)
    if best is None or cores is None or hertz is None:
        return None
    macs, how = table[best]
    source = f"derived: {cores} cores x {hertz / 1e9:.2g} GHz x {how}, theoretical peak"
    return Fact(float(f"{cores * hertz * macs * 2:.3g}"), source, date.today().isoformat())
