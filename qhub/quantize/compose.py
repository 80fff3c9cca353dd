"""`a+b`: the input scales of one quantizer with the rounding of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qhub.errors import UsageError
from qhub.interfaces import Block, Group, Quantizer
from qhub.types import ModelProfile, Scheme

if TYPE_CHECKING:
    import torch

    from qhub.quantize.qtensor import QTensor


class Composite(Quantizer):
    """Scales from `scaler`, then rounding by `rounder`."""

    scales = True

    def __init__(self, scaler: Quantizer, rounder: Quantizer) -> None:
        super().__init__()
        if not scaler.scales:
            message = f"`{scaler.name}` has no input scales to give to `{rounder.name}`"
            raise UsageError(message, hint=f"use `--plugin {rounder.name}` alone, or a method that scales first, e.g. `--plugin awq`")
        self.scaler, self.rounder = scaler, rounder
        self.needs = scaler.needs | rounder.needs
        self.name = f"{scaler.name}+{rounder.name}"

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """The reason of either part."""
        return self.scaler.reject(profile, scheme) or self.rounder.reject(profile, scheme)

    def scale_group(self, group: Group, block: Block) -> torch.Tensor | None:
        """The scaler's scale."""
        return self.scaler.scale_group(group, block)

    def quantize_group(self, group: Group, block: Block) -> Mapping[str, QTensor]:
        """The rounder's rounding."""
        return self.rounder.quantize_group(group, block)


def compose(parts: list[Quantizer]) -> Quantizer:
    """One quantizer from one or two.

    :raises UsageError: when there are more, the first does not scale, or one takes the whole model.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 2:
        message = f"cannot combine `{len(parts)}` quantizers: {', '.join(part.name for part in parts)}"
        raise UsageError(message, hint="combine one that scales with one that rounds, e.g. `--plugin awq --plugin gptq`")
    whole = next((part.name for part in parts if part.whole), None)
    if whole is not None:
        raise UsageError(f"`{whole}` takes the whole model and combines with no other method", hint=f"use `--plugin {whole}` alone")
    first, second = sorted(parts, key=lambda part: not part.scales)
    return Composite(first, second)
