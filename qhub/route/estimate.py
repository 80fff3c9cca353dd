"""What a model will weigh, need, reach and lose on a device, before anything ran: arithmetic on shapes and hardware facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from qhub.route.speed import Rate, Speed, decode, expert_share, latency, prompt_tokens_per_s
from qhub.types import Estimates, Goals, LayerShape, ModelProfile, Scheme, Target
from qhub.units import human_bytes

#: Context that memory is planned for, and the one that speed is stated at.
PLANNED_CONTEXT = 4096
TYPICAL_CONTEXT = 512
OVERHEAD_SHARE = 0.1
RUNTIME_BYTES = 256 << 20
_FLOAT_BITS = 16


def merged(profile: ModelProfile) -> ModelProfile:
    """`profile` with the rows of like layers put together: every figure stays, and a hundred times fewer layers are summed."""
    groups: dict[tuple[object, ...], list[LayerShape]] = {}
    for layer in profile.layers:
        key = (layer.kind, layer.shape[1:], layer.dtype, "shared" in layer.name, ".encoder." in layer.name, len(layer.shape))
        groups.setdefault(key, []).append(layer)
    return replace(profile, layers=tuple(_together(layers) for layers in groups.values()))


def _together(layers: Sequence[LayerShape]) -> LayerShape:
    first = layers[0]
    if not first.shape:
        return first
    rows = sum(layer.shape[0] for layer in layers)
    return replace(first, shape=(rows, *first.shape[1:]), bytes=sum(layer.bytes for layer in layers))


def is_quantized(layer: LayerShape, scheme: Scheme) -> bool:
    """Whether `scheme` stores this weight in fewer bits; the others stay at 16."""
    if scheme.is_float or len(layer.shape) < 2:
        return False
    if scheme.activation != "float":
        return layer.kind in ("linear", "expert", "head", "conv", "embedding")
    return layer.kind in ("linear", "expert") and (scheme.group_size is None or layer.shape[-1] % scheme.group_size == 0)


def layer_bytes(layer: LayerShape, scheme: Scheme) -> float:
    """Bytes of one weight under `scheme`; beside int8 activations what is not quantized stays at 32 bits if it is stored so."""
    if is_quantized(layer, scheme):
        return prod(layer.shape) * scheme.bits_per_weight / 8
    stays_fp32 = scheme.activation != "float" and layer.dtype == "fp32"
    return prod(layer.shape) * (32 if stays_fp32 else _FLOAT_BITS) / 8


def weight_bytes(profile: ModelProfile, scheme: Scheme) -> int:
    """Bytes of all weights under `scheme`; where the layers are not known, as if it stored all parameters."""
    if not profile.layers:
        return round(profile.parameters * scheme.bits_per_weight / 8)
    scheme = _as_stored(profile, scheme)
    return round(sum(layer_bytes(layer, scheme) for layer in profile.weights()))


def outer_bytes(profile: ModelProfile, scheme: Scheme) -> float:
    """Bytes of embedding and head under `scheme`; tied ones count once."""
    return sum(layer_bytes(layer, scheme) for layer in profile.weights() if layer.kind in ("embedding", "head"))


def _as_stored(profile: ModelProfile, scheme: Scheme) -> Scheme:
    """Language models keep embeddings and head at 16 bits, also where activations are integers."""
    return Scheme(scheme.weight_bits) if profile.task == "llm" and scheme.activation != "float" else scheme


def read_bytes_per_token(profile: ModelProfile, scheme: Scheme) -> int:
    """Bytes read to decode one token: active experts only, an untied embedding not at all, and the key-value cache."""
    total = float(TYPICAL_CONTEXT * (profile.kv_bytes_per_token or 0))
    if not profile.layers:
        return round(total + weight_bytes(profile, scheme))
    scheme = _as_stored(profile, scheme)
    for layer in profile.weights():
        if layer.kind != "embedding" or profile.tied_embeddings:
            total += layer_bytes(layer, scheme) * expert_share(profile, layer.name, layer.kind)
    return round(total)


def estimate(profile: ModelProfile, scheme: Scheme, target: Target, speed: Speed) -> Estimates:
    """Size, memory and speed of `profile` at `scheme` on `target`; `basis` says what each follows from."""
    if not profile.parameters:
        return Estimates(basis="size, memory and speed: unknown, since what the weights are does not follow from the files")
    size = weight_bytes(profile, scheme)
    context = min(profile.context_length or PLANNED_CONTEXT, PLANNED_CONTEXT)
    cache = context * (profile.kv_bytes_per_token or 0)
    peak: int | None = round((size + cache) * (1 + OVERHEAD_SHARE)) + RUNTIME_BYTES
    held = f"memory: weights + {context} tokens of cache" if cache else "memory: weights"
    memory = f"{held} + {OVERHEAD_SHARE:.0%} + {human_bytes(RUNTIME_BYTES)}"
    if target.os == "none":
        peak, memory = None, "memory: weights lie in flash; the arena of the activations is unknown"
    rate, basis = _rate(profile, scheme, target, speed)
    return Estimates(
        weight_bytes=size,
        peak_bytes=peak,
        tokens_per_s=rate.value if profile.task == "llm" else None,
        latency_ms=rate.value if profile.task != "llm" else None,
        basis=f"{memory}; {basis}",
    )


def _rate(profile: ModelProfile, scheme: Scheme, target: Target, speed: Speed) -> tuple[Rate, str]:
    if profile.task != "llm":
        rate = latency(profile, scheme, target, weight_bytes(profile, scheme))
        return rate, f"latency: {rate.basis}"
    rate = decode(read_bytes_per_token(profile, scheme), target, speed)
    prompt = prompt_tokens_per_s(profile, target)
    return rate, f"speed: {rate.basis}" + (f"; {prompt.basis}" if prompt.value else "")


def milliseconds(estimates: Estimates) -> float | None:
    """Time of one token or one item; None if unknown."""
    return estimates.latency_ms or (1000 / estimates.tokens_per_s if estimates.tokens_per_s else None)


def unmet(estimates: Estimates, target: Target, goals: Goals) -> tuple[str, ...]:
    """Which limits of the device and of the goals the estimates break; empty if they hold."""
    checks: list[tuple[str, int | None, int | None]] = [
        (f"the {_store(target)} of `{target.name}`", *_against_memory(estimates, target)),
        ("--max-memory", estimates.peak_bytes, goals.max_memory_bytes),
        ("--max-size", estimates.weight_bytes, goals.max_size_bytes),
    ]
    broken = [
        f"needs {human_bytes(need)} where {name} allows {human_bytes(limit)}"
        for name, need, limit in checks
        if need is not None and limit is not None and need > limit
    ]
    taken = milliseconds(estimates)
    if goals.max_latency_ms is not None and taken is not None and taken > goals.max_latency_ms:
        unit = "token" if estimates.tokens_per_s else "item"
        broken.append(f"takes {taken:.3g} ms per {unit} where --max-latency allows {goals.max_latency_ms:g} ms")
    return tuple(broken)


def _store(target: Target) -> str:
    return "flash" if target.os == "none" and target.flash_bytes else "memory"


def _against_memory(estimates: Estimates, target: Target) -> tuple[int | None, int | None]:
    """What has to fit into what: on a microcontroller the weights into its flash, elsewhere all into memory."""
    if target.os == "none":
        return estimates.weight_bytes, target.flash_bytes or target.usable_memory_bytes
    return estimates.peak_bytes, target.usable_memory_bytes


def largest_fitting_parameters(profile: ModelProfile, scheme: Scheme, target: Target) -> int | None:
    """About how many parameters a model of this kind may have to fit on `target`; None if its memory is unknown."""
    _, limit = _against_memory(Estimates(), target)
    if limit is None or not profile.parameters:
        return None
    room = limit if target.os == "none" else (limit - RUNTIME_BYTES) / (1 + OVERHEAD_SHARE)
    context = min(profile.context_length or PLANNED_CONTEXT, PLANNED_CONTEXT)
    per_parameter = (weight_bytes(profile, scheme) + context * (profile.kv_bytes_per_token or 0)) / profile.parameters
    return max(0, int(room / per_parameter))
