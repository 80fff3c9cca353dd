"""Codes, scales and zeros read back out of an IR."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qhub import QhubError, QTensor, Scheme
from qhub_openvino.export import FACTS, LAYERS, MODEL
from qhub_openvino.linear import CODES, SCALES, WEIGHT, ZEROS
from qhub_openvino.open import read_ir
from qhub_openvino.packing import unfields
from qhub_openvino.schemes import width_of
from qhub_openvino.vendor import ov

_MATRICES = (CODES, SCALES, ZEROS, WEIGHT)


@dataclass(frozen=True)
class Layer:
    """A quantized layer as the IR names it."""

    name: str
    scheme: Scheme
    outputs: int
    inputs: int

    @property
    def groups(self) -> int:
        """G."""
        return self.inputs // (self.scheme.group_size or self.inputs)


class IRFile:
    """The IR in the folder `path`, its weights mapped.

    :raises QhubError: when a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _, self.model = read_ir(path)
        self.constants = {node.get_friendly_name(): node for node in self.model.get_ops() if node.get_type_name() == "Constant"}

    def layers(self) -> Iterator[Layer]:
        """What was quantized."""
        try:
            stated = json.loads(self.model.get_rt_info([FACTS, LAYERS]).astype(str)).items()
            yield from (Layer(name, Scheme.parse(scheme), rows, inputs) for name, (scheme, rows, inputs) in stated)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise self.damaged(f"its facts `{FACTS}/{LAYERS}` lack or garble {error}") from None

    def fields(self, name: str, width: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The codes of `width` bits in the constant `name`, as they lie there; shape (rows, columns)."""
        node, count = self.constant(name), shape[0] * shape[1]
        if int(np.prod(list(node.shape))) != count or node.get_element_type().bitwidth != width:
            raise self.damaged(f"`{name}` does not have the type or the size it should have")
        return unfields(node.get_tensor_view().data.reshape(-1).view(np.uint8), width, count).reshape(shape)

    def scales(self, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """The constant `name` of floating-point numbers."""
        node = self.constant(name)
        if int(np.prod(list(node.shape))) != shape[0] * shape[1]:
            raise self.damaged(f"`{name}` does not have the size it should have")
        return np.array(node.data, dtype=np.float32).reshape(shape)

    def damaged(self, what: str) -> QhubError:
        """The error to raise."""
        return QhubError(f"`{self.path / MODEL}` is damaged: {' '.join(what.split())}", hint="export the model again")

    def has(self, name: str) -> bool:
        """Whether there is a constant `name`."""
        return name in self.constants

    def constant(self, name: str) -> ov.op.Constant:
        """The constant `name`."""
        if name not in self.constants:
            raise self.damaged(f"it has no `{name}`")
        return self.constants[name]


def read_layers(path: Path) -> Mapping[str, QTensor]:
    """The quantized layers of the artifact at `path`.

    :raises QhubError: when the files do not hold what they say.
    """
    file = IRFile(path)
    return {layer.name: _read(file, layer) for layer in file.layers()}


def _read(file: IRFile, layer: Layer) -> QTensor:
    import torch

    bits, width = layer.scheme.weight_bits, width_of(layer.scheme.weight_bits)
    per_group, middle = (layer.outputs, layer.groups), np.uint8(1 << (bits - 1))
    codes = file.fields(f"{layer.name}{CODES}", width, (layer.outputs, layer.inputs))
    scale = file.scales(f"{layer.name}{SCALES}", per_group)
    if layer.scheme.symmetric:
        codes = (codes + middle) & np.uint8((1 << width) - 1)
        zero = np.full(per_group, middle)
    else:
        zero = file.fields(f"{layer.name}{ZEROS}", width, per_group)
    parts = (codes.copy(), scale, zero.astype(np.float32))
    return QTensor(*(torch.from_numpy(part) for part in parts), bits, layer.scheme.symmetric)


def weight_bytes(path: Path) -> int:
    """Bytes of the matrices that every token reads; of one that is only looked up in, a row."""
    _, model = read_ir(path)
    return sum(_read_bytes(node) for node in model.get_ops() if node.get_type_name() == "Constant")


def _read_bytes(node: ov.op.Constant) -> int:
    readers = (reader.get_node() for reader in node.output(0).get_target_inputs())
    matrix = node.get_friendly_name().endswith(_MATRICES)
    return int(node.get_byte_size()) if matrix and not all(map(_looks_up, readers)) else 0


def _looks_up(reader: ov.Node) -> bool:
    """Whether rows are taken of what `reader` gives, and nothing else is done with it."""
    if reader.get_type_name() == "Convert":
        return all(_looks_up(further.get_node()) for further in reader.output(0).get_target_inputs())
    return bool(reader.get_type_name() == "Gather")
