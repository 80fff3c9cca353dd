"""What a recipe's options ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qhub import UsageError


@dataclass(frozen=True, slots=True)
class Settings:
    """How a network is trained; `epochs` and `lr` of 0 are chosen by the bits."""

    epochs: int = 0
    lr: float = 0.0
    rounds: int = 3
    batch: int = 64
    labels: float = 0.1
    augment: str = "auto"
    edges: str = "int8"
    patience: int = 5
    held: float = 0.1

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """The options of a recipe.

        :raises UsageError: for the first one with a value that it does not take.
        """
        for name, (rule, holds) in _RULES.items():
            if not holds(options[name]):
                raise UsageError(f"option `{name}` of `qat` is `{options[name]}`", hint=f"it takes {rule}")
        return cls(**options)


def _number(value: Any, low: float, high: float, *, whole: bool = False) -> bool:  # noqa: ANN401 - a plain YAML value
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high


_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("a whole number from 0 (chosen by the bits) to 10000", lambda value: _number(value, 0, 10_000, whole=True)),
    "lr": ("a number from 0 (chosen by the bits) to 1", lambda value: _number(value, 0, 1)),
    "rounds": ("a whole number from 1 to 10", lambda value: _number(value, 1, 10, whole=True)),
    "batch": ("a whole number from 1 to 4096", lambda value: _number(value, 1, 4096, whole=True)),
    "labels": ("a number from 0 to 1", lambda value: _number(value, 0, 1)),
    "augment": ("`auto` or `off`", lambda value: value in ("auto", "off")),
    "edges": ("`int8` (first and last layer stay at 8 bits) or `same`", lambda value: value in ("int8", "same")),
    "patience": ("a whole number from 1 to 10000", lambda value: _number(value, 1, 10_000, whole=True)),
    "held": ("a number from 0 to 0.5", lambda value: _number(value, 0, 0.5)),
}
DEFAULTS: Mapping[str, Any] = asdict(Settings())
