"""What a recommendation leaves out for a device, and why: other precisions, other families, plugins that are absent or archived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qhub.plugins import Plugins
from qhub.route.answers import conv_share
from qhub.route.device import cuda_capability, int8_of, kind_of, sixteen_bit
from qhub.route.registry import Registry
from qhub.types import Goals, ModelProfile, Rejected, Route, Scheme, Target

#: From these compute capabilities on a GPU multiplies 8-bit and 4-bit floats.
CUDA_FP8, CUDA_FP4 = 8.9, 10.0
RESEARCH_BITS = 2


def left_out(profile: ModelProfile, goals: Goals, target: Target, routes: Iterable[Route]) -> Iterator[Rejected]:
    """The precisions and families that none of `routes` (those to `target`) has, each with its reason."""
    routes = list(routes)
    schemes = [Scheme.parse(route.scheme) for route in routes]
    taken = {precision_of(scheme) for scheme in schemes}
    for name, why in _precisions(profile, target, taken):
        if name not in taken:
            yield Rejected(f"{target.name}: {name}", why)
    families = {route.family for route in routes}
    for name, why in _families(profile, goals, target):
        if name not in families:
            yield Rejected(f"{target.name}: {name}", why)


def absent(target: Target, profile: ModelProfile, registry: Registry, plugins: Plugins) -> Iterator[Rejected]:
    """Known plugins that would finish a route if they were installed, and tools that no route uses."""
    installed = {*plugins.exporters, *plugins.runtimes}
    for entry in registry.index.values():
        name = f"{target.name}: {entry.name}"
        if not entry.is_offered:
            if profile.task == "llm" or not entry.families:
                why = f"archived ({entry.status_source})" if entry.status == "archived" else "not a plugin"
                yield Rejected(name, why + entry.instead)
        elif entry.formats and entry.name not in installed and entry.finishes_target(target, profile.task):
            yield Rejected(name, entry.obstacle)


def precision_of(scheme: Scheme) -> str:
    """How a person calls the precision of `scheme`: fp16, bf16, int8, int4, nf4, …"""
    if scheme.name:
        return scheme.name
    return "binary/ternary" if scheme.weight_bits <= RESEARCH_BITS else f"int{scheme.weight_bits}"


def _precisions(profile: ModelProfile, target: Target, taken: set[str]) -> Iterator[tuple[str, str]]:
    yield "fp32", "twice the bytes of float16 for about 0.1 % of accuracy: for training, and for what float16 overflows"
    yield from _sixteen_bit(profile, target, taken)
    yield "int8", _why_not_int8(profile, target)
    yield "int4", _why_not_int4(profile, target, taken)
    yield "nf4", _why_not_nf4(target)
    yield "mixed", "bits per layer (`qhub run --override PATTERN=SCHEME`): chosen when a run has shown which layers need more"
    yield "binary/ternary", "research: 1 or 2 bits cost 5 to 10 % and more, and no installed plugin offers them"
    yield from _small_floats(target)


def _sixteen_bit(profile: ModelProfile, target: Target, taken: set[str]) -> Iterator[tuple[str, str]]:
    wanted = sixteen_bit(target)
    other = "bf16" if wanted == "fp16" else "fp16"
    level, why = int8_of(target)
    if level == "only":
        yield from ((name, why) for name in ("fp16", "bf16"))
        return
    if profile.task == "llm":
        yield wanted, "16-bit weights are read four times as slowly as 4-bit ones, and decoding is reading"
    else:
        yield wanted, "integers are smaller, and as exact as the goals ask"
    yield other, f"the same bytes as {wanted}, which is what `{target.name}` computes"


def _why_not_int8(profile: ModelProfile, target: Target) -> str:
    if profile.task == "llm":
        goals = "`--max-drop` below 1 brings them first, `--batch 16` with int8 activations"
        return f"8-bit weights are read at half the speed of 4-bit ones; {goals}"
    if profile.task == "unknown":
        return "how much a model of unknown type loses is unknown; `--scheme w8a8-static` asks for it all the same"
    return f"{int8_of(target)[1]}; `--scheme w8a8-static` or `--max-size` asks for it all the same"


def _why_not_int4(profile: ModelProfile, target: Target, taken: set[str]) -> str:
    if profile.task == "llm":
        return (
            "4-bit weights lose more than the goals allow, or the device has no kernels for them" if "int3" not in taken else "does not fit"
        )
    return f"arithmetic bounds a {profile.task} model, not reading weights: 4 bits lose 3 to 5 % and gain only size on `{target.name}`"


def _why_not_nf4(target: Target) -> str:
    if kind_of(target) == "nvidia":
        return "NF4 quantizes while loading, without data: calibrated int4 loses less; `qhub-bitsandbytes` is not installed"
    return f"NF4 needs kernels of bitsandbytes, which are made for NVIDIA GPUs; `{target.name}` has none"


def _small_floats(target: Target) -> Iterator[tuple[str, str]]:
    capability = cuda_capability(target)
    for name, needed in (("fp8", CUDA_FP8), ("nvfp4", CUDA_FP4)):
        if capability is None:
            yield name, f"`{target.name}` is not an NVIDIA GPU with {name.upper()} arithmetic"
        elif capability < needed:
            yield name, f"{name.upper()} arithmetic needs compute capability {needed}; `{target.name}` has `{capability}`"
        else:
            yield name, f"`{target.name}` computes {name.upper()}, but no plugin offers it yet"


def _families(profile: ModelProfile, goals: Goals, target: Target) -> Iterator[tuple[str, str]]:
    yield "qat", "needs training: `--retrain` says that it is possible"
    convolutional = conv_share(profile) > 0 and profile.task != "nlp"
    if profile.task in ("vision", "detection") or convolutional:
        share = f"{conv_share(profile):.0%} of the weights are convolutions" if convolutional else "most of it are convolutions"
        yield "dynamic", f"dynamic quantization does not take every op: linear and recurrent layers only, and {share}"
    elif profile.task == "llm":
        yield "dynamic", "int8 activations gain where many requests share the weights (`--batch 16`), not for one user"
    elif kind_of(target) != "cpu":
        yield "dynamic", f"ranges at run time have kernels for CPUs only, and `{target.name}` is none"
    else:
        yield "dynamic", "costs more accuracy than the goals allow"
    yield "static", _why_not_static(profile)


def _why_not_static(profile: ModelProfile) -> str:
    if profile.task == "llm":
        return "per-tensor ranges of a language model's activations have outliers (INC's SmoothQuant int8: LLaMA-7B -20 %)"
    if profile.task in ("nlp", "speech", "embedding"):
        return "inputs differ in length, and ranges of attention with them: dynamic ranges lose less"
    return "costs more accuracy than the goals allow"
