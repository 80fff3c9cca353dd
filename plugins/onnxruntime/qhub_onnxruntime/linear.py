"""A linear layer in the graph: quantized as `MatMulNBits` or as `DequantizeLinear` before a `MatMul`, or float as it is stored.

ONNX Runtime has codes of 2, 4 and 8 bits; those of 3 bits lie in 4, those of 5 to 7 in 8: the same numbers, more room.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from qhub import DecoderFiles, PackedLayer
from qhub_onnxruntime.graph import MICROSOFT, Graph
from qhub_onnxruntime.packing import fields, in_blocks, per_block, unstream
from qhub_onnxruntime.schemes import block_size_of, width_of

#: Ends of the names of a layer's initializers.
CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"
ACCURACY = 4  # activations are rounded to int8, which is what is fast on a CPU; a session can take it back
STORED = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
_SIGNED = {4: TensorProto.INT4, 8: TensorProto.INT8}
_UNSIGNED = {4: TensorProto.UINT4, 8: TensorProto.UINT8}
#: (graph, layer's name, its numbers, name of the input) → name of the product (…, N).
Quantized = Callable[[Graph, str, PackedLayer, str], str]


def matmul_nbits(graph: Graph, name: str, layer: PackedLayer, source: str) -> str:
    """`com.microsoft.MatMulNBits`: codes (N, blocks, bytes), scales (N, blocks), zeros packed (N, bytes)."""
    bits, block = layer.scheme.weight_bits, block_size_of(layer.scheme, layer.inputs)
    width, blocks = width_of(bits), -(-layer.inputs // block)
    inputs = [source, graph.constant(f"{name}{CODES}", in_blocks(layer.codes, bits, layer.inputs, block))]
    inputs.append(graph.constant(f"{name}{SCALES}", per_block(layer.scale, blocks)))
    if not (layer.zero is None and bits == width):  # without zeros the operator takes the middle
        inputs.append(graph.constant(f"{name}{ZEROS}", fields(per_block(_zeros(layer), blocks), width)))
    attributes = {"K": layer.inputs, "N": layer.outputs, "bits": width, "block_size": block, "accuracy_level": ACCURACY}
    return graph.node("MatMulNBits", inputs, f"{name}/product", MICROSOFT, **attributes)


def dequantize_linear(graph: Graph, name: str, layer: PackedLayer, source: str) -> str:
    """`DequantizeLinear` of codes (K, N), which other engines read too, before a `MatMul`; symmetric ones are signed, without zeros."""
    bits, width = layer.scheme.weight_bits, max(4, width_of(layer.scheme.weight_bits))
    codes = np.ascontiguousarray(unstream(layer.codes, bits, layer.inputs).T)
    if layer.zero is None:
        codes = (codes - np.uint8(1 << (bits - 1))) & np.uint8((1 << width) - 1)  # two's complement
    kind = (_SIGNED if layer.zero is None else _UNSIGNED)[width]
    inputs = [graph.raw(f"{name}{CODES}", fields(codes.reshape(-1), width), kind, codes.shape)]
    grouped = bool(layer.scheme.group_size)
    inputs.append(graph.constant(f"{name}{SCALES}", layer.scale.T if grouped else layer.scale[:, 0]))
    if layer.zero is not None:
        zeros = np.ascontiguousarray(layer.zero.T if grouped else layer.zero[:, 0])
        inputs.append(graph.raw(f"{name}{ZEROS}", fields(zeros.reshape(-1), width), kind, zeros.shape))
    where = {"axis": 0, "block_size": layer.every} if grouped else {"axis": 1}
    weight = graph.node("DequantizeLinear", inputs, f"{name}/weight", **where)
    return graph.node("MatMul", [source, weight], f"{name}/product")


def _zeros(layer: PackedLayer) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    middle = np.uint8(1 << (layer.scheme.weight_bits - 1))
    return np.full(layer.scale.shape, middle) if layer.zero is None else layer.zero


class Linears:
    """The layers of a model, put into `graph` as they are asked for; `quantized` says how a quantized one is multiplied."""

    def __init__(self, graph: Graph, files: DecoderFiles, quantized: Quantized) -> None:
        self.graph, self.files, self.quantized = graph, files, quantized

    def apply(self, name: str, source: str) -> str:
        """Layer `name` of the input `source` (…, K); the name of what it gives (…, N)."""
        if name in self.files.schemes:
            product = self.quantized(self.graph, name, self.files.packed(name), source)
        else:
            product = self.graph.node("FusedMatMul", [source, self.matrix(name)], f"{name}/product", MICROSOFT, transB=1)
        bias = self.files.bias(name)
        self.files.tensors.release()
        return product if bias is None else self.graph.node("Add", [product, self.graph.constant(f"{name}.bias", bias)], f"{name}/biased")

    def matrix(self, name: str) -> str:
        """The float matrix (N, K) of layer `name` as float32; in the file it is as the model stores it."""
        weight, stored = self.stored(name)
        return weight if stored == "F32" else self._cast(weight)

    def rows(self, name: str, ids: str) -> str:
        """Rows `ids` of the matrix of layer `name`, as float32."""
        weight, stored = self.stored(name)
        rows = self.graph.node("Gather", [weight, ids], f"{name}/rows")
        return rows if stored == "F32" else self.graph.node("Cast", [rows], f"{name}/rows_float", to=TensorProto.FLOAT)

    def stored(self, name: str) -> tuple[str, str]:
        """(name, dtype) of the matrix as it is stored."""
        info = self.files.tensors.info(f"{name}.weight")
        raw = self.files.tensors.raw(f"{name}.weight")
        return self.graph.raw(f"{name}.weight", raw, STORED[info.dtype], info.shape), info.dtype

    def _cast(self, weight: str) -> str:
        return self.graph.node("Cast", [weight], f"{weight}/float", to=TensorProto.FLOAT)
