"""How fast a model will run: decoding from memory bandwidth, everything else from the peak rate of arithmetic.

Decoding one token reads every weight once: tokens per second ≈ share × bandwidth ÷ bytes per token. The shares below are what
others measured (docs/routing.md lists every measurement and how far the estimate is from it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qhub.route.device import HBM_BYTES_PER_S, WIDE_BYTES_PER_S, int8_of, is_server, kind_of
from qhub.types import Fact, ModelProfile, Scheme, Target
from qhub.units import human_bytes


class Share(NamedTuple):
    """A share of a peak rate and by whom it is known."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Speed:
    """How much of the roofline a runtime reaches, and who says so."""

    efficiency: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """A number (None: unknown) and from what it follows."""

    value: float | None
    basis: str


#: Share of the peak bandwidth that decoding reaches, for models that read 1 GB or more per token.
NVIDIA = Share(0.73, "TinyChat on RTX 4090 and AGX Orin: 0.65 to 0.76")
NVIDIA_HBM = Share(0.32, "TinyChat on A100: 0.30; one request leaves such fast memory idle")
APPLE = Share(0.80, "llama.cpp on M1, M2 and M4: 0.77 to 0.86")
APPLE_WIDE = Share(0.65, "llama.cpp on M1 Max 0.57, MLX on M4 Max 0.76")
ARM = Share(0.62, "llama.cpp on Raspberry Pi 5: 0.58 to 0.66")
ARM_OLD = Share(0.23, "llama.cpp on Raspberry Pi 4, which has no dot product: 0.21 to 0.26")
X86 = Share(0.65, "llama.cpp on Core i9-13900K: 0.70")
X86_SERVER = Share(0.50, "Intel's LLM runtime on Xeon 8480+: 0.35 to 0.59")
OTHER = Share(0.60, "assumed for models that read 1 GB or more: 0.55 to 0.85 elsewhere")
#: Below 1 GB launches and other work that is not reading count.
SMALL_BYTES, SMALL = 1e9, Share(0.35, "assumed for models that read less than 1 GB: 0.39 for 1.2 B parameters on Jetson Orin Nano")
TINY_BYTES, TINY = 1.5e8, Share(0.20, "assumed for models that read less than 150 MB: 0.17 for 135 M parameters on Jetson Orin Nano")
#: Share of the peak arithmetic rate where that is the bound.
GPU_ARITHMETIC = Share(0.45, "prompts on RTX 4090 0.47, M4 0.42, M1 Max 0.77")
CPU_ARITHMETIC = Share(0.40, "assumed; prompts on Core i9-13900K reach 0.6")
AMX_ARITHMETIC = Share(0.05, "prompts on Xeon 8480+ with AMX: 0.02 to 0.03 of an int8 peak that nothing feeds")
#: Below this the time between kernels counts most.
OVERHEAD_MS = 1.0
#: Tokens per item that a latency is stated at, by task; Whisper always hears 30 s, which are 1500 positions.
TOKENS = {"nlp": 128, "embedding": 128}
WHISPER_POSITIONS = 1500
#: How a basis says that its number is a bound.
UPPER_BOUND, LOWER_BOUND = "an upper bound", "a lower bound"


def decode_share(target: Target, read_bytes: float) -> Share:
    """The share of the bandwidth that decoding is expected to reach on `target` where no runtime measured it."""
    if read_bytes < TINY_BYTES:
        return TINY
    if read_bytes < SMALL_BYTES:
        return min(SMALL, _of_kind(target), key=lambda share: share.value)
    return _of_kind(target)


def _of_kind(target: Target) -> Share:
    kind, bandwidth = kind_of(target), target.bandwidth_bytes_per_s
    if kind == "nvidia":
        return NVIDIA_HBM if bandwidth is not None and bandwidth.value > HBM_BYTES_PER_S else NVIDIA
    if kind == "apple":
        return APPLE_WIDE if bandwidth is not None and bandwidth.value > WIDE_BYTES_PER_S else APPLE
    if kind != "cpu":
        return OTHER
    if target.arch == "x86_64":
        return X86_SERVER if is_server(target) else X86
    if target.arch == "aarch64":
        return ARM if int8_of(target)[0] == "yes" else ARM_OLD
    return OTHER


def decode(read_bytes: float, target: Target, speed: Speed) -> Rate:
    """Tokens per second of one request."""
    rate = readings_per_s(read_bytes, target, speed)
    if rate.value is None:
        return rate
    tiny = f", {UPPER_BOUND}: with so little to read, overhead counts more than bandwidth" if read_bytes < TINY_BYTES else ""
    return Rate(rate.value, f"{rate.basis} per token{tiny}")


def readings_per_s(read_bytes: float, target: Target, speed: Speed) -> Rate:
    """How often the device reads so many bytes in a second."""
    bandwidth = target.bandwidth_bytes_per_s
    if bandwidth is None:
        detect = "; `qhub targets detect` measures it" if target.name == "host" else ""
        return Rate(None, f"unknown without the bandwidth of `{target.name}`{detect}")
    share = decode_share(target, read_bytes)
    if speed.efficiency is not None:
        share = Share(speed.efficiency, speed.source)
    rate = share.value * bandwidth.value / max(read_bytes, 1)
    peak = f"{bandwidth.value / 1e9:.4g} GB/s ({bandwidth.source})"
    text = f"{share.value:.2g} ({share.source}) × {peak} ÷ {human_bytes(read_bytes)}"
    return Rate(float(f"{rate:.3g}"), text)


def operations_per_item(profile: ModelProfile) -> Rate:
    """Multiply-adds of one item: measured shapes where the profile has them, 2-D weights × tokens for encoders, else unknown."""
    if profile.macs_per_item is not None:
        return Rate(float(profile.macs_per_item), f"{profile.macs_per_item / 1e9:.3g} G multiply-adds per item")
    matrices = [layer for layer in profile.linears() if len(layer.shape) == 2]
    if profile.task in TOKENS:
        macs = TOKENS[profile.task] * sum(layer.shape[0] * layer.shape[1] for layer in matrices)
        return Rate(macs or None, f"{TOKENS[profile.task]} tokens" if macs else "unknown without the shapes of the layers")
    if profile.task == "speech" and "Whisper" in profile.architecture:
        encoder = sum(layer.shape[0] * layer.shape[1] for layer in matrices if ".encoder." in f".{layer.name}")
        return Rate(WHISPER_POSITIONS * encoder or None, "the encoder for 30 s of sound, without the text")
    return Rate(None, "unknown without the multiply-adds per item")


def latency(profile: ModelProfile, scheme: Scheme, target: Target, size_bytes: int) -> Rate:
    """Milliseconds per item of a model of `size_bytes`: what takes longer, its arithmetic or reading its weights once."""
    work = operations_per_item(profile)
    if work.value is None:
        return work
    peak, name = peak_of(scheme, target)
    if peak is None:
        return Rate(None, f"unknown without the {name} rate of `{target.name}`")
    share = arithmetic_share(target)
    computing = 2e3 * work.value / (share.value * peak.value)
    rate = f"({share.value:.2g} ({share.source}) × {peak.value / 1e12:.3g} T{name}/s)"
    text = f"2 × {work.value / 1e9:.3g} G multiply-adds ({work.basis}) ÷ {rate}"
    reading = readings_per_s(size_bytes, target, Speed())
    if reading.value is not None and 1e3 / reading.value > computing:
        computing, text = (
            1e3 / reading.value,
            f"reading the weights takes longer than arithmetic: 1 ÷ ({reading.basis})",
        )
    if computing < OVERHEAD_MS:
        text += f", {LOWER_BOUND}: below 1 ms overhead counts most"
    return Rate(float(f"{computing:.3g}"), text)


def prompt_tokens_per_s(profile: ModelProfile, target: Target) -> Rate:
    """Tokens of a prompt that a language model reads per second: bound by arithmetic at 16 bits."""
    active = sum(layer.shape[0] * layer.shape[-1] * expert_share(profile, layer.name, layer.kind) for layer in profile.linears())
    peak = target.fp16_flops_per_s
    if peak is None or not active:
        return Rate(None, "")
    share = arithmetic_share(target)
    rate = share.value * peak.value / (2 * active)
    rate = float(f"{rate:.2g}")
    return Rate(rate, f"a prompt: about {rate:,.0f} tokens/s ({share.value:.2g} of {peak.value / 1e12:.3g} TFLOP/s)")


def peak_of(scheme: Scheme, target: Target) -> tuple[Fact | None, str]:
    """The peak rate that `scheme` computes at: int8 where weights and activations are, and the device multiplies it fast."""
    if scheme.activation != "float" and int8_of(target)[0] in ("yes", "slow", "only"):
        return target.int8_ops_per_s, "op"
    return target.fp16_flops_per_s, "FLOP"


def arithmetic_share(target: Target) -> Share:
    """The share of the peak rate of arithmetic that is expected to be reached."""
    if kind_of(target) not in ("cpu", "microcontroller"):
        return GPU_ARITHMETIC
    return AMX_ARITHMETIC if any(name.startswith("amx") for name in target.isa) else CPU_ARITHMETIC


def expert_share(profile: ModelProfile, name: str, kind: str) -> float:
    """Which part of a layer is used for one token: the chosen ones of routed experts, else all of it."""
    if kind == "expert" and "shared" not in name and profile.experts and profile.experts_per_token:
        return profile.experts_per_token / profile.experts
    return 1.0
