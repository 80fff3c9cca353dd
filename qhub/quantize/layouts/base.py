"""What every layout has in common: the layer as stored, its place in the files, and the questions asked of a layout.

A layout is a way to write `codes, scale, zero` of a matrix W (N, K) into a model folder. Everything a layer's headers say is
checked before a byte of it is read.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from qhub.errors import DamagedModelError, Unsupported
from qhub.quantize.qtensor import QTensor, dequantize
from qhub.skeleton import read_tensor
from qhub.types import Scheme
from qhub.weights import TensorInfo, WeightFiles

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class LayerFacts:
    """What the headers and the config say of a quantized layer of N outputs (`rows`) and K inputs (`columns`)."""

    scheme: Scheme
    rows: int
    columns: int
    turned: bool = False  # stored as (K, N), as qhub stores a layer whose float file holds (K, N)

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a scale; K where there is one scale per output."""
        return self.scheme.group_size or self.columns

    @property
    def groups(self) -> int:
        """Scales per output; the last group may be shorter."""
        return -(-self.columns // self.group_size)


@dataclass(frozen=True)
class StoredLayer:
    """A layer as somebody stored it: what a QTensor holds, but zeros may be 0 and columns in any order.

    codes (N, K) uint8 in the order of the inputs · scale, zero (N, G) float32 · groups (K,) int64: the group of each column,
    None where they are consecutive.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scheme: Scheme
    groups: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """W (N, K) float32, exactly what is stored."""
        if self.groups is None:
            return dequantize(self.codes, self.scale, self.zero)
        return (self.codes.float() - self.zero[:, self.groups]) * self.scale[:, self.groups]

    def tensor(self) -> QTensor:
        """The same as a QTensor; only where `groups` is None."""
        return QTensor(self.codes, self.scale, self.zero, self.scheme.weight_bits, self.scheme.symmetric)

    def equals(self, other: StoredLayer) -> bool:
        """Whether codes, scales, zeros and the order of the columns are the same numbers."""
        alike = all(torch.equal(one, two) for one, two in ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero)))
        if self.groups is None or other.groups is None:
            return alike and self.groups is None and other.groups is None
        return alike and torch.equal(self.groups, other.groups)


def in_order(layer: StoredLayer, group_size: int) -> StoredLayer:
    """The layer with `groups` None if each run of `group_size` columns is one group: the groups are then put in their order."""
    if layer.groups is None or layer.codes.shape[1] % group_size:
        return layer
    runs = layer.groups.reshape(-1, group_size)
    first = runs[:, 0]
    if not torch.equal(runs, first.unsqueeze(1).expand_as(runs)) or len(set(first.tolist())) != layer.scale.shape[1]:
        return layer
    return StoredLayer(layer.codes, layer.scale[:, first].contiguous(), layer.zero[:, first].contiguous(), layer.scheme)


@dataclass(frozen=True)
class PackedFolder:
    """A folder with quantized layers: its tensors, and the `quantization_config` of its config."""

    folder: Path
    files: WeightFiles
    section: Mapping[str, Any]

    def info(self, name: str) -> TensorInfo:
        """The header of tensor `name`.

        :raises DamagedModelError: when there is none.
        """
        if name not in self.files:
            raise self.damaged(f"it has no tensor `{name}`")
        return self.files[name]

    def check(self, name: str, dtypes: Sequence[str], shape: Sequence[int]) -> None:
        """Compare the header of tensor `name` with what the layer's other parts ask for.

        :raises DamagedModelError: when it is missing or differs.
        """
        info = self.info(name)
        if info.dtype not in dtypes or info.shape != tuple(shape):
            raise self.damaged(f"tensor `{name}` is {info.dtype} {list(info.shape)}; its layer needs {' or '.join(dtypes)} {list(shape)}")

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored."""
        return read_tensor(self.files, name)

    def number(self, key: str, value: Any) -> int:  # noqa: ANN401 - JSON
        """`value` of the config's `key`, where it has to be an integer.

        :raises DamagedModelError: when it is none.
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.damaged(f"`{key}` of its quantization_config is `{value}`, which is no integer")
        return value

    def damaged(self, why: str) -> DamagedModelError:
        """The error of a folder that contradicts itself."""
        return DamagedModelError(f"`{self.folder}` is damaged: {why}", hint="get the model again, or ask who quantized it")

    def unsupported(self, why: str) -> Unsupported:
        """The error of a folder that is whole, but stored in a way that is not read here."""
        return Unsupported(f"`{self.folder}` cannot be read: {why}", hint="docs/formats.md says what can; else start from the float model")


@dataclass(frozen=True)
class ModelFacts:
    """What a layout has to know of a whole model to write it.

    `kept` are the matrices that stay float, `reordered` says that some layer's columns have an order of their own.
    """

    layers: Mapping[str, LayerFacts]
    dtype: torch.dtype
    kept: Sequence[str] = ()
    reordered: bool = False
    transposed: frozenset[str] = frozenset()  # layers whose float files hold (K, N)
    expand: bool = False  # transformers has to expand the weights as it loads them

    @property
    def kept_inside(self) -> list[str]:
        """The matrices inside blocks that stay float."""
        return [name for name in self.kept if any(part.isdigit() for part in name.split("."))]


class Layout(ABC):
    """A way to store quantized layers."""

    #: What users call it: `qhub convert --to NAME`.
    name: ClassVar[str]
    #: The ending of the tensor that holds a layer's codes.
    codes: ClassVar[str]
    #: The endings of its other tensors; a bias is not one of them, it stays as it is.
    others: ClassVar[tuple[str, ...]]

    @abstractmethod
    def claims(self, section: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` says that the folder is stored in this layout."""

    @abstractmethod
    def facts(self, source: PackedFolder, name: str) -> LayerFacts:
        """What headers and config say of layer `name`; reads no weight.

        :raises DamagedModelError: when they contradict each other. :raises Unsupported: when it is stored in another way.
        """

    @abstractmethod
    def read(self, source: PackedFolder, name: str, facts: LayerFacts) -> StoredLayer:
        """Layer `name`, with columns in the order of the inputs."""

    @abstractmethod
    def refuse(self, model: ModelFacts) -> str | None:
        """Why this layout cannot carry such a model; looks at no number of it."""

    @abstractmethod
    def refuse_numbers(self, layer: StoredLayer) -> str | None:
        """Why it cannot carry the numbers of this layer: words with `{}` where the number of such layers belongs."""

    @abstractmethod
    def tensors(self, name: str, layer: StoredLayer, model: ModelFacts) -> dict[str, torch.Tensor]:
        """The stored tensors of layer `name`. Called with what is not refused."""

    @abstractmethod
    def section_of(self, model: ModelFacts) -> dict[str, Any]:
        """The `quantization_config` that readers of this layout need."""


def float_patterns(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """GPTQModel's `dynamic` entries that keep the layers `names` float."""
    return {f"-:^{re.escape(name)}$": {} for name in names}


def inexact_in_fp16(layer: StoredLayer) -> bool:
    """Whether a scale is another number in fp16."""
    return not torch.equal(layer.scale.half().float(), layer.scale)
