"""Quantized layers inside ONNX files: how their codes, scales and zeros are named and kept, and reading them back.

Layer X: `X.weight_codes` int8 (int4 at 4 bits), the codes less 2**(bits − 1), in the weight's shape or transposed for a product
with (K, N) · `X.weight_scale` float32 (N,) · `X.weight_zero` as the codes. In MatMulNBits they are uint8, and scales repeat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qhub.errors import QhubError
from qhub.graph.onnx_edit import attributes
from qhub.graph.torch_graph import CODES, SCALE, ZERO

if TYPE_CHECKING:
    from qhub.quantize.qtensor import QTensor

LAYERS, DIGEST = "qhub.layers", "qhub.recipe"  # keys of metadata_props
#: Which axis of a weight holds the outputs; DequantizeLinear says it itself.
_OUTPUT_AXIS = dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"), 1)


@dataclass(frozen=True)
class StoredLayer:
    """codes int8 in the shape of the weight, outputs first, less 2**(bits − 1) · scale (N,) float32 · zero (N,) int8, less the same.

    `dynamic`: its input is rounded while it runs.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int8]
    bits: int
    dynamic: bool = False

    @classmethod
    def of(cls, tensor: QTensor, shape: tuple[int, ...], *, dynamic: bool) -> StoredLayer:
        """A layer of one scale per output as it is stored; `shape` is the weight's."""
        half = 1 << (tensor.bits - 1)
        codes = (tensor.codes.numpy().astype(np.int16) - half).astype(np.int8).reshape(shape)
        zero = (tensor.zero[:, 0].numpy() - half).astype(np.int8)
        return cls(codes, tensor.scale[:, 0].numpy().astype(np.float32), zero, tensor.bits, dynamic)

    @property
    def symmetric(self) -> bool:
        """Whether all zeros are 0 as stored."""
        return not self.zero.any()

    @property
    def tensor(self) -> QTensor:
        """Codes (N, K), scale and zero (N, 1) as every layout has them."""
        import torch

        from qhub.quantize.qtensor import QTensor

        half = 1 << (self.bits - 1)
        codes = torch.from_numpy((self.codes.astype(np.int16) + half).astype(np.uint8).reshape(len(self.scale), -1))
        zero = torch.from_numpy(self.zero.astype(np.float32) + half).reshape(-1, 1)
        return QTensor(codes, torch.from_numpy(self.scale.copy()).reshape(-1, 1), zero, self.bits, self.symmetric)


def describe(model: onnx.ModelProto, layers: Mapping[str, StoredLayer], recipe_digest: str) -> None:
    """Say in the model's metadata which layers are quantized, to how many bits, and by which recipe."""
    about = {name: {"bits": layer.bits, "dynamic": layer.dynamic} for name, layer in layers.items()}
    entries = {**({LAYERS: json.dumps(about)} if layers else {}), **({DIGEST: recipe_digest} if recipe_digest else {})}
    kept = [item for item in model.metadata_props if item.key not in entries]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def read_onnx_layers(path: Path) -> dict[str, QTensor]:
    """The quantized layers of an ONNX file that `write_onnx` or `OnnxGraph` wrote, by name.

    :raises QhubError: when the file says it has a layer that it does not hold.
    """
    return layers_of(onnx.load(path), path)


def layers_of(model: onnx.ModelProto, path: Path) -> dict[str, QTensor]:
    """The quantized layers of a model that lies at `path`."""
    about: dict[str, Any] = next((json.loads(item.value) for item in model.metadata_props if item.key == LAYERS), {})
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    found = {}
    for name, what in about.items():
        missing = [end for end in (CODES, SCALE) if f"{name}.{end}" not in stored]
        if missing:
            raise QhubError(f"`{path}` has no `{name}.{missing[0]}`", hint="write the artifact again with `qhub run`")
        arrays = {end: onnx.numpy_helper.to_array(stored[key]) for end in (CODES, SCALE, ZERO) if (key := f"{name}.{end}") in stored}
        node = readers[f"{name}.{CODES}"]
        node = readers[node.output[0]] if node.op_type == "Cast" else node  # int4, for engines that multiply int8
        found[name] = _read(arrays, node, what["bits"]).tensor
    return found


def _read(arrays: Mapping[str, NDArray[Any]], node: onnx.NodeProto, bits: int) -> StoredLayer:
    """A layer as the node that reads it takes it: which axis of the codes holds the outputs follows from that."""
    codes: NDArray[Any] = arrays[CODES]
    scale: NDArray[Any] = arrays[SCALE].reshape(-1)
    if node.op_type == "MatMulNBits":
        about = attributes(node)
        rows = _unpacked(codes, bits).reshape(about["N"], -1)[:, : about["K"]].astype(np.int16) - (1 << (bits - 1))
        scale = scale.reshape(about["N"], -1)
        if (scale != scale[:, :1]).any():
            raise QhubError(f"the scales of `{node.input[2]}` differ within a row", hint="write the artifact again with `qhub run`")
        return StoredLayer(rows.astype(np.int8), scale[:, 0], np.zeros(len(rows), np.int8), bits)
    axis = _OUTPUT_AXIS.get(node.op_type, attributes(node).get("axis", 0))
    codes = np.moveaxis(codes.astype(np.int8), axis, 0)
    zero = arrays[ZERO].astype(np.int8) if ZERO in arrays else np.zeros(len(codes), np.int8)
    return StoredLayer(np.ascontiguousarray(codes), scale, np.broadcast_to(zero.reshape(-1), scale.shape), bits)


def _unpacked(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The codes of MatMulNBits (N, blocks, bytes) one by one: at 4 bits the low half of a byte is the even one."""
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1)
