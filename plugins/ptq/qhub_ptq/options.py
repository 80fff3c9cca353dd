"""What a recipe's options ask for, with what depends on the device filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qhub import Target, UsageError

#: option → the values it takes; `smooth` also takes a number between 0 and 1.
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "range": ("mse", "minmax", "percentile", "entropy"),
    "symmetric": ("auto", True, False),
    "equalize": ("auto", "off"),
    "correct_bias": (True, False),
    "compensate": (True, False),
    "smooth": ("auto", "off"),
    "reduce_range": ("auto", True, False),
}
DEFAULTS: Mapping[str, Any] = {name: values[0] for name, values in CHOICES.items()}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a graph is rounded."""

    range: str = "mse"
    symmetric: bool = False  # zero of activations in the middle of the codes
    equalize: bool = True
    correct_bias: bool = True
    compensate: bool = True  # weights below 8 bits: errors are made up for
    smooth: bool | float = True  # True: the exponent is searched
    reduce_range: bool = False  # weights of 7 bits, stored as 8

    @classmethod
    def of(cls, options: Mapping[str, Any], target: Target | None) -> Settings:
        """The options with `auto` decided for the device."""
        symmetric, reduce = options["symmetric"], options["reduce_range"]
        return cls(
            range=options["range"],
            symmetric=_wants_symmetric(target) if symmetric == "auto" else bool(symmetric),
            equalize=options["equalize"] == "auto",
            correct_bias=bool(options["correct_bias"]),
            compensate=bool(options["compensate"]),
            smooth={"auto": True, "off": False}.get(options["smooth"], options["smooth"]),
            reduce_range=_overflows(target) if reduce == "auto" else bool(reduce),
        )


def check(options: Mapping[str, Any]) -> None:
    """Say which option has a value that it does not take.

    :raises UsageError: for the first such option.
    """
    for name, values in CHOICES.items():
        given = options[name]
        is_number = name == "smooth" and isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given <= 1
        if not is_number and not any(given is value or (isinstance(given, str) and given == value) for value in values):
            known = ", ".join(str(value).lower() for value in values) + (", or a number from 0 to 1" if name == "smooth" else "")
            raise UsageError(f"option `{name}` of `ptq` is `{given}`", hint=f"use one of: {known}")


def _wants_symmetric(target: Target | None) -> bool:
    """TensorRT takes no zero points."""
    return target is not None and any(name.startswith("cuda") for name in target.accelerators)


def _overflows(target: Target | None) -> bool:
    """x86 without VNNI adds pairs of 8-bit products in 16 bits, which saturate."""
    return target is not None and target.arch == "x86_64" and not target.accelerators and not any("vnni" in isa for isa in target.isa)
