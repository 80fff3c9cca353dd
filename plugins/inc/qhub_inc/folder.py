"""What the tool made, saved unpacked: X.codes, X.scale, X.zero and X.facts of each layer, and every other tensor by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qhub import QTensor, Scheme

FILE = "made.safetensors"
_PARTS = ("codes", "scale", "zero", "facts")


def parts_of(unpacked: Mapping[str, Any], scheme: Scheme) -> dict[str, torch.Tensor]:
    """The parts of one layer from the tool's unpacked numbers.

    int_weight (N, K) and zp (N, G) count from 0; without zp, int_weight counts from −2**(bits−1). scales (N, G).
    """
    half = 1 << (scheme.weight_bits - 1)
    codes, zero, scale = unpacked["int_weight"].int(), unpacked.get("zp"), unpacked["scales"].float()
    if zero is None:
        codes, zero = codes + half, torch.full_like(scale, float(half))
    mask = (1 << scheme.weight_bits) - 1  # eight bits come as signed numbers
    facts = torch.tensor([scheme.weight_bits, int(scheme.symmetric)])
    return {"codes": (codes & mask).to(torch.uint8), "scale": scale, "zero": (zero.int() & mask).float(), "facts": facts}


class UnpackedFolder:
    """The saved result as a `qhub.WholeResult`; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        with safe_open(self._path, "pt") as file:
            self._names = tuple(file.keys())

    def tensor_names(self) -> Iterator[str]:
        """All tensors that are no part of a quantized layer."""
        return (name for name in self._names if name.rpartition(".")[2] not in _PARTS)

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` as saved."""
        with safe_open(self._path, "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def layer(self, name: str) -> QTensor:
        """Layer `name`, its numbers as the tool has them."""
        codes, scale, zero, facts = (self.tensor(f"{name}.{part}") for part in _PARTS)
        return QTensor(codes, scale, zero, int(facts[0]), bool(facts[1]))
