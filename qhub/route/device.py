"""What a device can do, read from its facts alone: which kind it is, which int8 is fast there, which 16-bit numbers it computes."""

from __future__ import annotations

from typing import Literal

from qhub.types import Target

Kind = Literal["microcontroller", "edge-tpu", "tpu", "npu", "nvidia", "apple", "mobile-gpu", "gpu", "cpu"]
#: yes: a dot product in hardware. slow: it works, and gains memory more than time. no: it is widened to float.
#: only: nothing else is computed.
Int8 = Literal["yes", "slow", "no", "only"]

#: Accelerator, by prefix → the kind of device it makes; the first that matches decides.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("edgetpu", "edge-tpu"),
    ("tpu", "tpu"),
    ("cuda", "nvidia"),
    ("metal", "apple"),
    ("gpu-mobile", "mobile-gpu"),
    ("gpu", "gpu"),
    ("hexagon", "npu"),
    ("npu", "npu"),
)
_BESIDE_A_CPU = ("gpu", "npu")
#: Instruction sets of CPUs with an int8 dot product.
_DOT_PRODUCTS = ("avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm", "sme")
#: Bytes per second above which Apple's chips are Max and Ultra: their GPUs use a smaller share of the bandwidth.
WIDE_BYTES_PER_S = 300e9
#: Bytes per second above which NVIDIA's GPUs have stacked memory, of which one request uses a smaller share.
HBM_BYTES_PER_S = 1900e9
#: CPUs with at least this many cores are servers.
SERVER_CORES = 24
FULL_INT8_CUDA, NO_FP16_CUDA = 7.5, 5.3


def kind_of(target: Target) -> Kind:
    """The part of the device that runs the model."""
    if target.os == "none":
        return "microcontroller"
    for prefix, kind in _KINDS:
        if kind in _BESIDE_A_CPU and target.isa:  # a laptop's CPU is what is meant; its other processors are targets of their own
            continue
        if any(accelerator.startswith(prefix) for accelerator in target.accelerators):
            return kind
    return "cpu"


def cuda_capability(target: Target) -> float | None:
    """The compute capability of its NVIDIA GPU; None if it has none."""
    found = [float(name.removeprefix("cuda-")) for name in target.accelerators if name.startswith("cuda-")]
    return max(found, default=None)


def hexagon_version(target: Target) -> int | None:
    """The version of its Hexagon tensor processor, e.g. 73; None if it has none."""
    found = [name.removeprefix("hexagon-v") for name in target.accelerators if name.startswith("hexagon-v")]
    return max((int(version) for version in found if version.isdigit()), default=None)


def int8_of(target: Target) -> tuple[Int8, str]:
    """How the device computes int8, and why."""
    kind = kind_of(target)
    if kind == "microcontroller":
        return "only", f"`{target.name}` is a microcontroller: its kernels take full int8 only"
    if kind == "edge-tpu":
        return "only", "the Edge TPU computes full int8 only"
    if kind == "npu" and (hexagon_version(target) or 99) < 69:
        return "only", f"Hexagon before v69 computes int8 only, no float16 (`{target.name}`)"
    if kind == "nvidia":
        return _int8_of_cuda(target)
    return _int8_of_others(target, kind)


def _int8_of_cuda(target: Target) -> tuple[Int8, str]:
    capability = cuda_capability(target) or 0.0
    if capability >= FULL_INT8_CUDA:
        return "yes", f"tensor cores multiply int8 from compute capability {FULL_INT8_CUDA} on; `{target.name}` has `{capability}`"
    return "no", f"`{target.name}` (compute capability `{capability}`) has no tensor cores for int8: support is limited"


def _int8_of_others(target: Target, kind: Kind) -> tuple[Int8, str]:
    if kind == "apple":
        if any(name.startswith("sme") for name in target.isa):
            return "yes", "the Neural Engine computes int8 from M4 and A17 Pro on"
        return "no", "Apple's Neural Engine before M4 and A17 Pro widens int8 to float16: it gains size, not time"
    if kind == "mobile-gpu":
        return "no", "mobile GPUs compute in float16 and widen int8"
    if kind == "tpu":
        return "yes", "a TPU computes bfloat16 and int8"
    if kind in ("npu", "gpu"):
        return "yes", f"`{target.accelerators[0]}` multiplies int8 fast"
    have = [name for name in target.isa if name.startswith(_DOT_PRODUCTS)]
    if have:
        return "yes", f"`{have[-1]}` multiplies int8 fast"
    if target.arch == "x86_64":
        return "slow", f"`{target.name}` has no VNNI: int8 runs on AVX2 too (older charts ask for AVX-512), 1.5 to 2 times as fast as float"
    return "slow", f"`{target.name}` has no int8 dot product: int8 saves memory, and little time"


def sixteen_bit(target: Target) -> Literal["fp16", "bf16"]:
    """Which 16-bit numbers the device computes: bfloat16 on TPUs, AMD's NPUs and CPUs with bf16 instructions, else float16."""
    if kind_of(target) == "tpu" or any(name.startswith("npu-xdna") for name in target.accelerators):
        return "bf16"
    if kind_of(target) == "cpu" and any(name in ("amx_bf16", "avx512_bf16") for name in target.isa):
        return "bf16"
    return "fp16"


def computes_sixteen_bit(target: Target) -> bool:
    """Whether 16-bit numbers are multiplied as they are, rather than widened to 32 bits first."""
    if kind_of(target) == "cpu":
        return any(name in ("amx_bf16", "avx512_bf16", "avx512_fp16", "fp16") for name in target.isa)
    capability = cuda_capability(target)
    return capability is None or capability >= NO_FP16_CUDA


def wants_symmetric(target: Target) -> bool:
    """Whether its kernels for 4-bit weights take no zero points: the NPUs of Intel and Qualcomm."""
    return any(name.startswith(("npu-intel", "hexagon")) for name in target.accelerators)


def is_server(target: Target) -> bool:
    """Whether it is a CPU of a server, by its number of cores."""
    return kind_of(target) == "cpu" and (target.cores or 0) >= SERVER_CORES
