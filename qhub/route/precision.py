"""Which scheme a method is asked for: the bits of the leaf, groups that suit the model, fewer bits where they are needed to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qhub.route.accuracy import SMALL_MODEL_GROUP, SMALL_MODEL_PARAMETERS
from qhub.route.device import kind_of, sixteen_bit, wants_symmetric
from qhub.route.estimate import is_quantized
from qhub.types import Family, ModelProfile, Scheme, Target

GROUP_SIZES = (128, 64, 32, 16)
#: What is tried when the first choice does not fit.
FEWER_BITS = 3
#: Kinds of devices with kernels for 3-bit weights; NPUs, TPUs and mobile GPUs have 4 and 8 bits only.
_THREE_BITS = ("cpu", "nvidia", "apple", "gpu")


def family_of(scheme: Scheme) -> Family:
    """The family of methods that writes `scheme`."""
    if scheme.is_float:
        return "float16"
    return "weight-only" if scheme.activation == "float" else scheme.activation


def suits(scheme: Scheme, family: Family) -> bool:
    """Whether methods of `family` write `scheme`; training with quantization ends at any integer scheme."""
    return not scheme.is_float if family == "qat" else family_of(scheme) == family


def default_scheme(default: str, family: Family, target: Target) -> Scheme:
    """`default` of a method, or the scheme of `family` on `target` where the method serves several families."""
    if family == "float16":
        return Scheme(16, name=sixteen_bit(target))
    scheme = Scheme.parse(default)
    if suits(scheme, family) or family == "weight-only":
        return scheme
    return Scheme(8, 8, None, True, "dynamic" if family == "dynamic" else "static")


def levels(profile: ModelProfile, target: Target, default: Scheme, weight_bits: int | None) -> Iterator[Sequence[Scheme]]:
    """Schemes to try: each level is one number of bits with the group sizes that suit the model, best first.

    `weight_bits` is what the chart's leaf says; the levels after the first are for where it does not fit.
    """
    if default.is_float:
        yield (default, Scheme(16, name="bf16" if default.name == "fp16" else "fp16"))
        return
    if not default.is_weight_only:
        yield (default,)
        return
    if weight_bits == 8 and default.weight_bits < 8:
        yield (Scheme(8),)
    yield grouped(profile, target, default)
    if default.weight_bits > FEWER_BITS and kind_of(target) in _THREE_BITS:
        yield grouped(profile, target, replace(default, weight_bits=FEWER_BITS))


def grouped(profile: ModelProfile, target: Target, default: Scheme) -> tuple[Scheme, ...]:
    """`default` with each group size that may suit, best first; some NPUs want symmetric groups."""
    if default.group_size is None:
        return (default,)
    start = min(default.group_size, SMALL_MODEL_GROUP) if profile.parameters <= SMALL_MODEL_PARAMETERS else default.group_size
    schemes = [replace(default, group_size=size) for size in GROUP_SIZES if size <= start]
    schemes.sort(key=lambda scheme: -_divided_share(profile, scheme))  # stable: of equals, the largest group stays first
    symmetric = [] if default.symmetric else [replace(scheme, symmetric=True) for scheme in schemes]
    if wants_symmetric(target) and symmetric:
        return (*symmetric, Scheme(default.weight_bits))
    return (*schemes, *symmetric, Scheme(default.weight_bits))


def _divided_share(profile: ModelProfile, scheme: Scheme) -> float:
    """Share of the parameters in blocks whose K the group size divides."""
    linears = profile.linears()
    total = sum(layer.shape[0] * layer.shape[-1] for layer in linears)
    return sum(layer.shape[0] * layer.shape[-1] for layer in linears if is_quantized(layer, scheme)) / max(total, 1)
