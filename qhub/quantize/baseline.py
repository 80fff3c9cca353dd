"""The baseline of every report: the same layers at the same schemes, rounded to nearest, without writing a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from qhub.quantize.grid import quantize_rtn
from qhub.skeleton import FloatWeights
from qhub.types import Scheme


class RoundedWeights:
    """The float model's weights with `schemes` (layer → scheme) applied by rounding to nearest as they are read."""

    def __init__(self, folder: Path, schemes: Mapping[str, Scheme], transposed: frozenset[str] = frozenset()) -> None:
        self.folder = folder
        self.weights = FloatWeights(folder)
        self.schemes = schemes
        self.transposed = transposed  # layers whose files hold (K, N), as GPT-2's do

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def model_dtype(self) -> torch.dtype:
        """The dtype that most of the matrices are stored in."""
        return self.weights.model_dtype()

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, rounded to nearest and back if it is one of the layers."""
        tensor = self.weights.read(name)
        layer = self._layer(name)
        if layer is None:
            return tensor
        scheme = self.schemes[layer]
        weight = tensor.t() if layer in self.transposed else tensor
        rounded = quantize_rtn(weight.float(), scheme, self.model_dtype()).dequantize(tensor.dtype)
        return rounded.t() if layer in self.transposed else rounded

    def _layer(self, stored: str) -> str | None:
        """The layer whose weight is called `stored` in the files, which may leave out the model's prefix (`transformer.`)."""
        layer = stored.removesuffix(".weight")
        if layer == stored:
            return None
        return next((name for name in self.schemes if name == layer or name.endswith(f".{layer}")), None)
