"""A linear layer in the IR: its codes as they are with their scales and zeros before a `MatMul`, or float as it is stored.

OpenVINO has codes of 4 and 8 bits; those of 2 and 3 bits lie in 4, those of 5 to 7 in 8: the same numbers, more room.
"""

from __future__ import annotations

import numpy as np

from qhub import DecoderFiles, PackedLayer
from qhub_openvino.constants import Constants
from qhub_openvino.packing import fields, unstream
from qhub_openvino.schemes import width_of
from qhub_openvino.vendor import ops, ov

#: Ends of the names of a layer's constants: of a quantized one, and of a float one.
CODES, SCALES, ZEROS, WEIGHT = ".codes", ".scales", ".zeros", ".weight"
STORED = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}
_SIGNED = {4: ov.Type.i4, 8: ov.Type.i8}
_UNSIGNED = {4: ov.Type.u4, 8: ov.Type.u8}


class Linears:
    """The layers of a model, put into the IR as they are asked for."""

    def __init__(self, constants: Constants, files: DecoderFiles) -> None:
        self.constants, self.files = constants, files
        self._float: dict[str, ov.Output] = {}

    def apply(self, name: str, source: ov.Output) -> ov.Output:
        """Layer `name` of the input `source` (…, K); what it gives (…, N)."""
        matrix = self._quantized(name) if name in self.files.schemes else self.matrix(name)
        product = ops.matmul(source, matrix, False, True)
        product.set_friendly_name(name)
        bias = self.files.bias(name)
        self.files.tensors.release()
        return product.output(0) if bias is None else ops.add(product, ops.constant(bias)).output(0)

    def matrix(self, name: str) -> ov.Output:
        """The float matrix (N, K) of layer `name` as float32; in the file it is as the model stores it."""
        if name not in self._float:
            tensor = f"{name}{WEIGHT}"
            info = self.files.tensors.info(tensor)
            stored = self.constants.mapped(self.files.tensors.raw(tensor), STORED[info.dtype], info.shape, tensor)
            self._float[name] = stored if info.dtype == "F32" else ops.convert(stored, "f32").output(0)
        return self._float[name]

    def _quantized(self, name: str) -> ov.Output:
        """(codes − zeros) · scales as float32 (N, K)."""
        layer = self.files.packed(name)
        grouped = (layer.outputs, layer.inputs // layer.every, layer.every) if layer.scheme.group_size else (layer.outputs, layer.inputs)
        per_group = (*grouped[:-1], 1)
        numbers = ops.convert(self._codes(name, layer, grouped), "f16")
        if layer.zero is not None:
            width = width_of(layer.scheme.weight_bits)
            kept = fields(layer.zero, width)
            zeros = self.constants.rewritten(kept, _UNSIGNED[width], per_group, f"{name}{ZEROS}")
            numbers = ops.subtract(numbers, ops.convert(zeros, "f16"))
        weight = ops.multiply(numbers, self._scales(name, layer, per_group))
        if layer.scheme.group_size:
            weight = ops.reshape(weight, np.array([layer.outputs, layer.inputs]), False)
        return ops.convert(weight, "f32").output(0)

    def _codes(self, name: str, layer: PackedLayer, shape: tuple[int, ...]) -> ov.Output:
        """Symmetric codes are signed, less the middle; others as they are, from the model's own file where they lie there so."""
        bits = layer.scheme.weight_bits
        width, name = width_of(bits), f"{name}{CODES}"
        if layer.zero is not None and bits == width and layer.inputs * bits % 8 == 0:
            return self.constants.mapped(layer.codes[:, : layer.inputs * bits // 8], _UNSIGNED[width], shape, name)
        codes = unstream(layer.codes, bits, layer.inputs)
        if layer.zero is not None:
            return self.constants.rewritten(fields(codes, width), _UNSIGNED[width], shape, name)
        signed = (codes - np.uint8(1 << (bits - 1))) & np.uint8((1 << width) - 1)  # two's complement
        return self.constants.rewritten(fields(signed, width), _SIGNED[width], shape, name)

    def _scales(self, name: str, layer: PackedLayer, shape: tuple[int, ...]) -> ov.Output:
        return self.constants.rewritten(layer.scale.astype(np.float16), ov.Type.f16, shape, f"{name}{SCALES}")
