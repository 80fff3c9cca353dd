"""What is said of a graph: its operations, where it is rounded, and by how much; the same for torch programs and ONNX files.

A tensor is called by the name of the operation that makes it, a layer by the name of its weight without `.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qhub.errors import QhubError

if TYPE_CHECKING:
    import torch

    from qhub.quantize.qtensor import QTensor

#: One batch: input name → array, axis 0 the items.
Batch = Mapping[str, NDArray[np.generic]]
#: conv and linear have weights · join: adds or multiplies two tensors · clip: ReLU and the like, free at the end of an integer
#: operation · carry: moves or picks numbers, changing none · pool: averages · norm: normalises (also softmax) · other: anything.
Kind = Literal["conv", "linear", "join", "clip", "carry", "pool", "norm", "other"]


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: `inputs` are the tensors that depend on the network's input; weight and bias are not among them."""

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    layer: str | None = None  # conv, linear and norm: the name of the weight, without `.weight`
    channel_axis: int = 1  # of its output: which axis holds the channels
    low: float | None = None  # clip: the bounds
    high: float | None = None

    @property
    def has_weight(self) -> bool:
        """Whether it multiplies by a weight that can be quantized."""
        return self.kind in ("conv", "linear")


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """How a tensor's numbers are rounded: x ≈ (code − zero) · scale, codes 0 … 2**bits − 1."""

    scale: float
    zero: int
    bits: int = 8

    @property
    def low(self) -> float:
        """The smallest number that is held."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """The largest."""
        return ((1 << self.bits) - 1 - self.zero) * self.scale


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor that is rounded for the operations in `readers`; `like` names the tensor whose grid it has to share."""

    tensor: str
    readers: tuple[str, ...]
    like: str | None = None


@dataclass(frozen=True)
class Quantization:
    """What a method decided: codes of weights (N, K) by layer, grids of tensors, and who reads them rounded.

    `dynamic` layers round their input to 8 bits per row while they run. `biases` (N,) float32 replace a layer's own. `casts` are
    the layers whose weights are only stored in 16 bits: "float16" or "bfloat16".
    """

    weights: Mapping[str, QTensor] = field(default_factory=dict)
    activations: Mapping[str, ActivationGrid] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dynamic: frozenset[str] = frozenset()
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    casts: Mapping[str, str] = field(default_factory=dict)

    def without(self, ops: Collection[Op]) -> Quantization:
        """The same with `ops` computed in float: their weights and biases stay, and what they read is not rounded for them."""
        names, layers = {op.name for op in ops}, {op.layer for op in ops}
        readers = {tensor: tuple(name for name in there if name not in names) for tensor, there in self.readers.items()}
        return replace(
            self,
            weights={layer: codes for layer, codes in self.weights.items() if layer not in layers},
            readers={tensor: there for tensor, there in readers.items() if there},
            dynamic=self.dynamic - layers,
            biases={layer: bias for layer, bias in self.biases.items() if layer not in layers},
        )


@dataclass(frozen=True, slots=True)
class GraphInput:
    """An input of a network: its shape with -1 for what varies (axis 0 is the batch), and its numpy dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def grid_json(grid: ActivationGrid) -> dict[str, Any]:
    """A grid as it stands in `qhub.json`."""
    return {"scale": grid.scale, "zero": grid.zero, "bits": grid.bits}


def fitting_array(network: object, item: GraphInput, batch: Batch) -> NDArray[np.generic]:
    """The array of a batch for an input of `network` (its name or path), in the input's number format.

    :raises QhubError: when the batch lacks it, or it has a shape that the network does not take.
    """
    array = batch.get(item.name)
    if array is None:
        raise QhubError(f"`{network}` takes `{item.name}`, which the batch lacks: it has {', '.join(batch)}", hint="name the arrays so")
    if array.ndim != len(item.shape) or any(size not in (-1, found) for size, found in zip(item.shape, array.shape, strict=True)):
        wanted, found = ("×".join("any" if size < 0 else str(size) for size in shape) for shape in (item.shape, array.shape))
        raise QhubError(f"`{item.name}` of `{network}` takes {wanted}; the data is {found}", hint="check the preprocessing of the data")
    return np.ascontiguousarray(array, dtype=item.dtype)
