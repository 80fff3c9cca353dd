"""Codes, scales and zeros read back out of an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from qhub import QhubError, QTensor, Scheme
from qhub_onnxruntime.decoder import ROPE
from qhub_onnxruntime.export import LAYERS
from qhub_onnxruntime.graph import DATA, MODEL
from qhub_onnxruntime.linear import CODES, SCALES, ZEROS
from qhub_onnxruntime.packing import per_group, unfields
from qhub_onnxruntime.schemes import width_of

_TYPES = {TensorProto.FLOAT: "<f4", TensorProto.UINT8: "u1", TensorProto.INT8: "u1"}
_HALVES = (TensorProto.UINT4, TensorProto.INT4)


@dataclass(frozen=True)
class Layer:
    """A quantized layer as the file's metadata names it."""

    name: str
    scheme: Scheme
    outputs: int
    inputs: int

    @property
    def groups(self) -> int:
        """G."""
        return self.inputs // (self.scheme.group_size or self.inputs)


class OnnxFile:
    """The graph in the folder `path`, its weights mapped.

    :raises QhubError: when a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load_model(path / MODEL, load_external_data=False)
            self._data: NDArray[np.uint8] = np.memmap(path / DATA, dtype=np.uint8, mode="r")
        except Exception as error:  # noqa: BLE001 - protobuf's own, or the system's
            raise self._damaged(str(error)) from None
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def layers(self) -> Iterator[Layer]:
        """What was quantized."""
        facts = {prop.key: prop.value for prop in self.model.metadata_props}
        try:
            stated = json.loads(facts[LAYERS]).items()
            yield from (Layer(name, Scheme.parse(scheme), rows, inputs) for name, (scheme, rows, inputs) in stated)
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(f"its metadata `{LAYERS}` lacks or garbles {error}") from None

    def array(self, name: str) -> NDArray[np.generic]:
        """The initializer `name` in its shape; fields of four bits as bytes in one row."""
        tensor = self.initializers.get(name)
        if tensor is None:
            raise self._damaged(f"it has no `{name}`")
        raw = self._bytes(tensor)
        if tensor.data_type in _HALVES:
            return raw
        try:
            return raw.view(_TYPES[tensor.data_type]).reshape(tuple(tensor.dims))
        except (KeyError, ValueError):
            raise self._damaged(f"`{name}` does not have the type or the size it should have") from None

    def _bytes(self, tensor: onnx.TensorProto) -> NDArray[np.uint8]:
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(tensor.raw_data, dtype=np.uint8)
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, count = int(place["offset"]), int(place["length"])
        if place["location"] != DATA or start + count > len(self._data):
            raise self._damaged(f"`{tensor.name}` is not in `{DATA}`")
        return self._data[start : start + count]

    def _damaged(self, what: str) -> QhubError:
        return QhubError(f"`{self.path / MODEL}` is damaged: {' '.join(what.split())}", hint="export the model again")


def read_layers(path: Path) -> Mapping[str, QTensor]:
    """The quantized layers of the artifact at `path`.

    :raises QhubError: when the file does not hold what its metadata says.
    """
    file = OnnxFile(path)
    operators = {node.input[1]: node for node in file.model.graph.node if node.op_type == "MatMulNBits"}
    return {layer.name: _read(file, layer, operators.get(f"{layer.name}{CODES}")) for layer in file.layers()}


def _read(file: OnnxFile, layer: Layer, operator: onnx.NodeProto | None) -> QTensor:
    import torch

    codes, scale, zero = _blocked(file, layer) if operator is not None else _plain(file, layer)
    kinds = (np.uint8, np.float32, np.float32)
    tensors = (torch.from_numpy(np.array(part, dtype=kind, order="C")) for part, kind in zip((codes, scale, zero), kinds, strict=True))
    return QTensor(*tensors, layer.scheme.weight_bits, layer.scheme.symmetric)


_Parts = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]


def _blocked(file: OnnxFile, layer: Layer) -> _Parts:
    """Of `MatMulNBits`."""
    width = width_of(layer.scheme.weight_bits)
    fields = file.array(f"{layer.name}{CODES}")
    codes = unfields(fields.reshape(layer.outputs, -1), width, layer.inputs)
    blocks = fields.shape[1]
    scale = per_group(file.array(f"{layer.name}{SCALES}"), layer.groups)
    zeros = np.full((layer.outputs, layer.groups), 1 << (layer.scheme.weight_bits - 1), dtype=np.uint8)
    found: NDArray[np.generic] | None = zeros
    if f"{layer.name}{ZEROS}" in file.initializers:
        found = per_group(unfields(file.array(f"{layer.name}{ZEROS}"), width, blocks), layer.groups)
    if scale is None or found is None:
        raise QhubError(f"`{file.path / MODEL}`: blocks of one group of `{layer.name}` differ", hint="export the model again")
    return codes, scale, found


def _plain(file: OnnxFile, layer: Layer) -> _Parts:
    """Of `DequantizeLinear`."""
    bits = layer.scheme.weight_bits
    width, count = max(4, width_of(bits)), layer.outputs * layer.inputs
    codes = unfields(file.array(f"{layer.name}{CODES}").reshape(-1), width, count).reshape(layer.inputs, layer.outputs).T
    middle = np.uint8(1 << (bits - 1))
    if layer.scheme.symmetric:
        codes = (codes + middle) & np.uint8((1 << width) - 1)
        zero = np.full((layer.outputs, layer.groups), middle)
    else:
        fields = file.array(f"{layer.name}{ZEROS}").reshape(-1)
        zero = unfields(fields, width, layer.outputs * layer.groups).reshape(layer.groups, layer.outputs).T
    return codes, file.array(f"{layer.name}{SCALES}").reshape(layer.groups, layer.outputs).T, zero


def weight_bytes(path: Path) -> int:
    """Bytes of the matrices that every token reads."""
    model = onnx.load_model(path / MODEL, load_external_data=False)
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    used = [node.input[0] for node in model.graph.node if node.op_type == "Cast"]
    used += [name for node in model.graph.node for name in node.input if node.op_type == "FusedMatMul"]
    total = 0
    for tensor in model.graph.initializer:
        table = tensor.name.startswith(ROPE) or (tensor.name in looked_up and tensor.name not in used)
        if len(tensor.dims) > 1 and not table:
            total += next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), len(tensor.raw_data))
    return total
