"""How each question of the flowchart is answered from the model, the goals and the facts of the device, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qhub.route.accuracy import SMALL_MODEL_GROUP, expected_drop
from qhub.route.device import computes_sixteen_bit, cuda_capability, hexagon_version, int8_of, kind_of, sixteen_bit, wants_symmetric
from qhub.types import Goals, ModelProfile, Scheme, Target
from qhub.units import human_bytes

#: An answer and why it is the answer ("" if the question says it all).
Answer = tuple[str, str]

#: From this many requests at once decoding is bound by arithmetic rather than by memory bandwidth.
MANY_REQUESTS = 16
#: From this compute capability on there are GPU kernels for 4-bit weights (Marlin).
CUDA_4BIT = 7.5
_LARGEST_CONV_SHARE = 0.25
INT8 = Scheme(8, 8, None, True, "static")


@dataclass(frozen=True, slots=True)
class Situation:
    """What a question is answered from."""

    profile: ModelProfile
    goals: Goals
    target: Target


def retraining(situation: Situation) -> Answer:
    """Whether the user may train the model again."""
    if situation.goals.retrain:
        return "yes", "retraining is possible, which loses the least accuracy; it happens on a training machine, so it serves any device"
    return "no", "no retraining: post-training quantization, which is quick"


def model_type(situation: Situation) -> Answer:
    """What the model is for."""
    profile = situation.profile
    if profile.task == "unknown":
        return "unknown", f"what `{profile.architecture}` is for is unknown: only float16 is safe"
    return profile.task, f"`{profile.architecture}` is a model of type `{profile.task}`"


def runs_it(situation: Situation) -> Answer:
    """Whether a model of this type runs on such a device at all."""
    profile, target, kind = situation.profile, situation.target, kind_of(situation.target)
    if profile.task == "llm" and kind == "microcontroller":
        return "no", f"`{target.name}` has no operating system and no room for a language model"
    if kind == "edge-tpu" and (profile.task == "llm" or (profile.layers and conv_share(profile) < _LARGEST_CONV_SHARE)):
        return "no", f"`{target.name}` runs full-int8 TFLite graphs of convolutions, and caches some 8 MB: no transformers"
    return "yes", ""


def requests(situation: Situation) -> Answer:
    """One user or a server: what bounds decoding."""
    batch = situation.goals.batch
    if batch < MANY_REQUESTS:
        return "few", ""
    level, why = int8_of(situation.target)
    if level != "yes":
        return "few", f"{batch} requests at once would want 8-bit arithmetic, but {why}"
    return "many", f"{batch} requests at once are bound by arithmetic: int8 weights and activations rather than 4-bit weights; {why}"


def runs_4bit(situation: Situation) -> Answer:
    """Whether kernels for 4-bit weights exist for the device."""
    target = situation.target
    kind, capability = kind_of(target), cuda_capability(target)
    if capability is not None:
        if capability < CUDA_4BIT:
            return "no", f"4-bit GPU kernels need compute capability {CUDA_4BIT}; `{target.name}` has `{capability}`"
        older = " (older charts say Ampere: Marlin kernels run on Turing too)" if capability < 8 else ""
        return "yes", f"GPU kernels for 4-bit weights need compute capability {CUDA_4BIT}; `{target.name}` has `{capability}`{older}"
    if kind == "tpu":
        return "8 bits", f"`{target.name}` computes bfloat16 and int8: 8-bit weights are what its servers run"
    if int8_of(target)[0] == "only":
        return "8 bits", int8_of(target)[1]
    return "yes", _why_4bit(target, kind)


def _why_4bit(target: Target, kind: str) -> str:
    if kind == "apple":
        return "older charts say no 4-bit on Apple silicon: MLX and llama.cpp run it on the GPU today"
    if kind == "npu":
        version = hexagon_version(target)
        kind = "symmetric 4-bit weights" if wants_symmetric(target) else "4-bit weights"
        return f"`{target.accelerators[0]}` runs {kind}" + (" with static shapes" if version else "")
    if kind in ("gpu", "mobile-gpu"):
        return f"llama.cpp and the vendor's runtime have kernels for 4-bit weights on `{target.accelerators[0]}`"
    if target.arch == "x86_64":
        return "older charts say no 4-bit on CPUs: int4 kernels run on every CPU with AVX2 today"
    if target.arch == "aarch64":
        return "int4 kernels run on every 64-bit Arm CPU with NEON"
    return f"nothing speaks against 4-bit weights on `{target.arch}`, but no tuned kernels are known"


def weights_loss(situation: Situation) -> Answer:
    """At how many bits the expected loss is what the user allows."""
    profile, allowed = situation.profile, situation.goals.max_drop_pct
    four = expected_drop(profile, Scheme(4, 16, SMALL_MODEL_GROUP, False), "weight-only")
    eight = expected_drop(profile, Scheme(8), "weight-only")
    if four.pct is not None and four.pct <= allowed:
        return "at 4 bits", f"about {four.pct:g} % are expected to be lost at 4 bits, {allowed:g} % are allowed"
    if eight.pct is not None and eight.pct <= allowed:
        return "at 8 bits", f"a drop of at most {allowed:g} % is tight: 8 bits come first (about {four.pct:g} % at 4 bits)"
    return "no", f"a drop of at most {allowed:g} % is less than what 8 bits are expected to cost ({eight.pct:g} %)"


def int8_loss(situation: Situation) -> Answer:
    """Whether the expected loss of int8 is what the user allows."""
    allowed = situation.goals.max_drop_pct
    drop = expected_drop(situation.profile, INT8, "static")
    expected = f"about {drop.pct:g} % ({drop.basis})"
    if drop.pct is not None and drop.pct <= allowed:
        return "yes", f"int8 is expected to cost {expected}, {allowed:g} % are allowed"
    return "no", f"int8 is expected to cost {expected}, only {allowed:g} % are allowed"


def fast_int8(situation: Situation) -> Answer:
    """How the device computes int8."""
    target = situation.target
    if kind_of(target) == "tpu":
        return (
            "no",
            f"`{target.name}` computes bfloat16 as it is: nothing to calibrate, next to no loss; int8 doubles its rate where that counts",
        )
    return int8_of(target)


def suited_int8(situation: Situation) -> Answer:
    """Dynamic on CPUs, static where ranges must be known before; none where float16 is as fast."""
    target, kind = situation.target, kind_of(situation.target)
    level, why = int8_of(target)
    if level == "only" or kind == "npu":
        return "static", why if level == "only" else f"`{target.accelerators[0]}` wants static shapes and ranges"
    if kind != "cpu":
        return "none", f"dynamic INT8 has kernels for CPUs only; on `{target.name}` float16 is fast as it is"
    if level == "slow" and target.arch != "x86_64":
        return _by_layers(situation.profile, f"{why}, but float16 would be widened to 32 bits")
    return _by_layers(situation.profile, why)


def possible_int8(situation: Situation) -> Answer:
    """Which int8 is left where float16 does not fit."""
    target = situation.target
    if kind_of(target) != "cpu":
        return "static", f"`{target.name}` runs INT8 with ranges that are known before"
    return _by_layers(situation.profile, int8_of(target)[1])


def _by_layers(profile: ModelProfile, why: str) -> Answer:
    share = conv_share(profile)
    if share > _LARGEST_CONV_SHARE:
        text = f"{share:.0%} of the weights are convolutions, for which there are no dynamic kernels: static; {why}"
        return "static", text
    return "dynamic", why


def conv_share(profile: ModelProfile) -> float:
    """Share of the bytes of all matrices that belongs to convolutions; 0 where the layers are not known."""
    sizes = {kind: sum(layer.bytes for layer in profile.layers if layer.kind == kind) for kind in ("conv", "linear", "expert", "head")}
    total = sum(sizes.values())
    return sizes["conv"] / total if total else 0.0


def float16_fits(situation: Situation) -> Answer:
    """Whether the weights fit at 16 bits, on a device that computes them."""
    goals, profile, target = situation.goals, situation.profile, situation.target
    level, why = int8_of(target)
    if level == "only":
        return "no", why
    if not profile.parameters:
        return "yes", f"whether {sixteen_bit(target)} fits is unknown: so is the number of parameters"
    need = profile.parameters * 2
    limit, who = _limit(goals, target)
    if limit is not None and need > limit:
        return "no", f"{sixteen_bit(target)} needs {human_bytes(need)} where {who} allows {human_bytes(limit)}"
    return "yes", _why_float16(profile, target)


def _limit(goals: Goals, target: Target) -> tuple[int | None, str]:
    limits = [
        (goals.max_size_bytes, "--max-size"),
        (goals.max_memory_bytes, "--max-memory"),
        (target.usable_memory_bytes, f"`{target.name}`"),
    ]
    return min(((limit, who) for limit, who in limits if limit is not None), default=(None, ""))


def _why_float16(profile: ModelProfile, target: Target) -> str:
    size = f"{sixteen_bit(target)} fits: {human_bytes(profile.parameters * 2)}"
    if not computes_sixteen_bit(target):
        return f"{size}; `{target.name}` widens it to 32 bits to compute: half the size, no more speed"
    return f"{size}, and `{target.name}` computes it natively"


Place = Literal["dynamic", "static"]


def int8_family(profile: ModelProfile, target: Target) -> Place:
    """The int8 that suits where int8 is wanted: static for images and fixed devices, dynamic for the rest on CPUs."""
    if profile.task in ("vision", "detection"):
        return "static"
    answer = possible_int8(Situation(profile, Goals(), target))[0]
    return "dynamic" if answer == "dynamic" else "static"


def fused_experts(profile: ModelProfile) -> str | None:
    """Why a mixture of experts cannot be walked: transformers holds the routed experts of a block as one tensor.

    None for other models, and for those whose own code decides that.
    """
    routed = next((layer for layer in profile.layers if layer.kind == "expert" and "shared" not in layer.name), None)
    if routed is None or profile.own_code:
        return None
    return f"qhub quantizes linear layers, and transformers holds experts such as `{routed.name}` as fused tensors"
