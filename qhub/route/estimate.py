"""What a model will weigh, need and reach on a device, before anything ran: arithmetic on shapes and hardware facts.

Decoding one token reads every weight once, so tokens per second ≈ efficiency × bandwidth ÷ bytes read per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from qhub.types import Estimates, Goals, LayerShape, ModelProfile, Scheme, Target
from qhub.units import human_bytes

#: Context that memory is planned for, and the one that speed is stated at.
PLANNED_CONTEXT = 4096
TYPICAL_CONTEXT = 512
#: Share of the peak bandwidth that decoding reaches where no runtime measured it: 0.55 to 0.85 for models above
#: 1 GB, 0.2 to 0.5 below, where launch overhead counts.
EFFICIENCY, EFFICIENCY_SMALL, SMALL_BYTES = 0.6, 0.35, 1e9
#: Below this the bandwidth says little: the estimate is an upper bound.
TINY_BYTES = 1e8
OVERHEAD_SHARE = 0.1
RUNTIME_BYTES = 256 << 20
_FLOAT_BITS = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """How much of the roofline a runtime reaches, and who says so."""

    efficiency: float | None = None
    source: str = ""


def weights(profile: ModelProfile) -> Iterator[LayerShape]:
    """Every weight that counts: a head that is tied to the embedding counts once."""
    for layer in profile.layers:
        if not (profile.tied_embeddings and layer.kind == "head"):
            yield layer


def is_quantized(layer: LayerShape, scheme: Scheme) -> bool:
    """Whether `scheme` stores this weight in fewer bits; the others stay at 16."""
    if scheme.is_float or len(layer.shape) < 2:
        return False
    if scheme.activation != "float":
        return layer.kind in ("linear", "expert", "head", "conv")
    return layer.kind in ("linear", "expert") and (scheme.group_size is None or layer.shape[-1] % scheme.group_size == 0)


def layer_bytes(layer: LayerShape, scheme: Scheme) -> float:
    """Bytes of one weight under `scheme`."""
    bits = scheme.bits_per_weight if is_quantized(layer, scheme) else _FLOAT_BITS
    return prod(layer.shape) * bits / 8


def weight_bytes(profile: ModelProfile, scheme: Scheme) -> int:
    """Bytes of all weights under `scheme`."""
    return round(sum(layer_bytes(layer, scheme) for layer in weights(profile)))


def read_bytes_per_token(profile: ModelProfile, scheme: Scheme) -> int:
    """Bytes read to decode one token: active experts only, an untied embedding not at all, and the key-value cache."""
    share = 1.0
    if profile.experts and profile.experts_per_token:
        share = profile.experts_per_token / profile.experts
    total = float(TYPICAL_CONTEXT * (profile.kv_bytes_per_token or 0))
    for layer in weights(profile):
        if layer.kind == "embedding" and not profile.tied_embeddings:
            continue
        routed = layer.kind == "expert" and "shared" not in layer.name
        total += layer_bytes(layer, scheme) * (share if routed else 1.0)
    return round(total)


def estimate(profile: ModelProfile, scheme: Scheme, target: Target, speed: Speed) -> Estimates:
    """Size, memory and speed of `profile` at `scheme` on `target`; `basis` says what each follows from."""
    size = weight_bytes(profile, scheme)
    context = min(profile.context_length or PLANNED_CONTEXT, PLANNED_CONTEXT)
    cache = context * (profile.kv_bytes_per_token or 0)
    base = 0 if target.os == "none" else RUNTIME_BYTES
    peak = round((size + cache) * (1 + OVERHEAD_SHARE)) + base
    held = f"memory: weights + {context} tokens of cache" if cache else "memory: weights"
    basis = [f"{held} + {OVERHEAD_SHARE:.0%} + {human_bytes(base)}"]
    tokens_per_s = None
    if profile.task == "llm":
        tokens_per_s, why = _tokens_per_s(profile, scheme, target, speed)
        basis.append(f"speed: {why}")
    basis.append("accuracy: a run measures it")
    return Estimates(weight_bytes=size, peak_bytes=peak, tokens_per_s=tokens_per_s, basis="; ".join(basis))


def _tokens_per_s(profile: ModelProfile, scheme: Scheme, target: Target, speed: Speed) -> tuple[float | None, str]:
    bandwidth = target.bandwidth_bytes_per_s
    if bandwidth is None:
        detect = "; `qhub targets detect` measures it" if target.name == "host" else ""
        return None, f"unknown without the bandwidth of `{target.name}`{detect}"
    read = read_bytes_per_token(profile, scheme)
    share, source = speed.efficiency, speed.source
    if share is None:
        share = EFFICIENCY if read >= SMALL_BYTES else EFFICIENCY_SMALL
        source = "assumed for models that read " + ("1 GB or more" if read >= SMALL_BYTES else "less than 1 GB")
    rate = share * bandwidth.value / max(read, 1)
    text = f"{share:.2g} ({source}) × {bandwidth.value / 1e9:.4g} GB/s ({bandwidth.source}) ÷ {human_bytes(read)} per token"
    if read < TINY_BYTES:
        text += ", an upper bound: with so little to read, overhead counts more than bandwidth"
    return float(f"{rate:.3g}"), text


def unmet(estimates: Estimates, target: Target, goals: Goals) -> tuple[str, ...]:
    """Which limits of the device and of the goals the estimates break; empty if they hold."""
    checks: list[tuple[str, int | None, int | None]] = [
        (f"the memory of `{target.name}`", estimates.peak_bytes, target.usable_memory_bytes),
        ("--max-memory", estimates.peak_bytes, goals.max_memory_bytes),
        ("--max-size", estimates.weight_bytes, goals.max_size_bytes),
    ]
    broken = [
        f"needs {human_bytes(need)} where {name} allows {human_bytes(limit)}"
        for name, need, limit in checks
        if need is not None and limit is not None and need > limit
    ]
    latency = estimates.latency_ms or (1000 / estimates.tokens_per_s if estimates.tokens_per_s else None)
    if goals.max_latency_ms is not None and latency is not None and latency > goals.max_latency_ms:
        broken.append(f"takes {latency:.3g} ms per token where --max-latency allows {goals.max_latency_ms:g} ms")
    return tuple(broken)


def largest_fitting_parameters(profile: ModelProfile, scheme: Scheme, target: Target) -> int | None:
    """About how many parameters a model of this kind may have to fit on `target`; None if its memory is unknown."""
    if target.usable_memory_bytes is None or not profile.parameters:
        return None
    room = (target.usable_memory_bytes - (0 if target.os == "none" else RUNTIME_BYTES)) / (1 + OVERHEAD_SHARE)
    context = min(profile.context_length or PLANNED_CONTEXT, PLANNED_CONTEXT)
    per_parameter = (weight_bytes(profile, scheme) + context * (profile.kv_bytes_per_token or 0)) / profile.parameters
    return max(0, int(room / per_parameter))
