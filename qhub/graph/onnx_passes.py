"""What is done to an ONNX model with quantize and dequantize operations so that an engine computes it in integers.

Layers are found by the names that `onnx_stored` gives their codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper

from qhub.errors import Unsupported
from qhub.graph.onnx_edit import Array, OnnxEditor, attributes, int4
from qhub.graph.onnx_stored import StoredLayer
from qhub.graph.torch_graph import CODES, SCALE, ZERO

_MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class OnnxStyle:
    """What an engine wants to see.

    `bias`: as int32 codes or float · `activations`: the type of their codes; int8 needs zeros of 0 · `dynamic`: how a layer that
    rounds its input while it runs is written: "tensor" (DynamicQuantizeLinear and MatMulInteger), "blocks" (MatMulNBits, which
    rounds each row in blocks), "engine" (float: the engine is told to, when it is opened) · `widen_int4`: 4-bit codes become int8
    before they are dequantized, for engines that multiply int8 · `pad_codes`: Pad moves codes, for engines that would compute it
    in float.
    """

    bias: Literal["int32", "float"] = "int32"
    activations: Literal["uint8", "int8"] = "uint8"
    dynamic: Literal["tensor", "blocks", "engine"] = "tensor"
    widen_int4: bool = True
    pad_codes: bool = True


ONNXRUNTIME = OnnxStyle()
OPENVINO = OnnxStyle(bias="float", dynamic="engine", widen_int4=False, pad_codes=False)
TENSORRT = OnnxStyle(bias="float", activations="int8", dynamic="engine", widen_int4=False, pad_codes=False)


def lower(editor: OnnxEditor, layers: Mapping[str, StoredLayer], style: OnnxStyle) -> None:
    """Rewrite the model for an engine; the weights read `layer.weight_codes` through a DequantizeLinear."""
    _average_globally(editor)
    _drop_repeated(editor)
    if style.pad_codes:
        _pad_codes(editor)
    for layer in layers:
        _transpose(editor, layer)
    for layer, stored in layers.items():
        if stored.dynamic and style.dynamic != "engine":
            _LOWER_DYNAMIC[style.dynamic](editor, layer, stored)
    if style.activations == "int8":
        _signed(editor)
    if style.bias == "int32":
        _round_biases(editor)
    _pack_int4(editor, layers, style)


def store_layer(editor: OnnxEditor, layer: str, stored: StoredLayer, axis: int) -> tuple[str, str, str]:
    """Keep a layer's codes with the outputs along `axis`, its scale and its zero; their names, as DequantizeLinear takes them."""
    codes = editor.store(f"{layer}.{CODES}", np.moveaxis(stored.codes, 0, axis))
    return codes, editor.store(f"{layer}.{SCALE}", stored.scale), editor.store(f"{layer}.{ZERO}", stored.zero)


def _average_globally(editor: OnnxEditor) -> None:
    """A mean over height and width, as torch exports adaptive pooling, is a GlobalAveragePool: engines have that in integers."""
    for mean in [node for node in editor.nodes if node.op_type == "ReduceMean" and len(node.input) == 2]:
        axes = editor.constant(mean.input[1])
        if axes is None or sorted(axes.tolist()) not in ([-2, -1], [2, 3]) or not _rank_is_four(editor, mean.input[0]):
            continue
        if attributes(mean).get("keepdims", 1):
            editor.replace(mean, [helper.make_node("GlobalAveragePool", [mean.input[0]], list(mean.output))])
        else:
            _pool_and_flatten(editor, mean)


def _pool_and_flatten(editor: OnnxEditor, mean: NodeProto) -> None:
    """The axes of one entry go after the pool, which is rounded as its result is."""
    source, out = mean.input[0], mean.output[0]
    pooled = editor.name(f"{out}_pool")
    made, last = [helper.make_node("GlobalAveragePool", [source], [pooled])], pooled
    rounding = [node for node in editor.readers(out) if node.op_type == "QuantizeLinear"]
    if len(rounding) == 1 == len(editor.readers(out)):
        codes, last = editor.name(f"{pooled}_codes"), editor.name(f"{pooled}_rounded")
        made.append(helper.make_node("QuantizeLinear", [pooled, *rounding[0].input[1:]], [codes]))
        made.append(helper.make_node("DequantizeLinear", [codes, *rounding[0].input[1:]], [last]))
    editor.replace(mean, [*made, helper.make_node("Flatten", [last], [out], axis=1)])


def _pad_codes(editor: OnnxEditor) -> None:
    """Padding with 0 between two roundings on one grid is padding the codes with their zero."""
    for pad in [node for node in editor.nodes if node.op_type == "Pad" and attributes(node).get("mode", b"constant") == b"constant"]:
        before, readers = editor.maker(pad.input[0], "DequantizeLinear"), editor.readers(pad.output[0])
        value = editor.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
        if before is None or value is None or value.any() or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            continue
        if _grid(editor, before) == _grid(editor, readers[0]):
            editor.bypass(readers[0], pad.output[0])
            pad.input[:] = [before.input[0], pad.input[1], before.input[2], *pad.input[3:]]


def _rank_is_four(editor: OnnxEditor, name: str) -> bool:
    """Whether a 2-d convolution made the value, perhaps clipped, added, pooled and rounded since."""
    for _ in range(64):
        node = editor.maker(name)
        if node is None:
            return False
        if node.op_type == "Conv":
            weight = editor.maker(node.input[1])
            stored = editor.constant(weight.input[0] if weight is not None else node.input[1])
            return stored is not None and stored.ndim == 4
        if node.op_type not in ("Relu", "Clip", "Add", "MaxPool", "AveragePool", "QuantizeLinear", "DequantizeLinear"):
            return False
        name = node.input[0]
    return False


def _drop_repeated(editor: OnnxEditor) -> None:
    """Rounding what is already rounded on the same grid changes nothing."""
    for again in [node for node in editor.nodes if node.op_type == "QuantizeLinear"]:
        before = editor.maker(again.input[0], "DequantizeLinear")
        if before is not None and _grid(editor, before) == _grid(editor, again):
            editor.bypass(again, before.input[0])


def _grid(editor: OnnxEditor, node: NodeProto) -> tuple[object, ...]:
    numbers = [editor.constant(name) for name in node.input[1:]]
    return tuple((values.dtype.name, values.shape, values.tobytes()) if values is not None else None for values in numbers)


def _transpose(editor: OnnxEditor, layer: str) -> None:
    """MatMul reads (K, N): in place of a Transpose after the weight, and of Gemm's transB, the codes lie that way."""
    dequantized = [node for node in editor.readers(f"{layer}.{CODES}") if node.op_type == "DequantizeLinear"]
    readers = [reader for node in dequantized for reader in editor.readers(node.output[0])]
    turned = [node for node in readers if node.op_type == "Transpose" and attributes(node)["perm"] == [1, 0]]
    gemms = [node for node in readers if node.op_type == "Gemm" and attributes(node).get("transB")]
    if not readers or len(turned) + len(gemms) != len(readers):
        return
    codes = editor.constant(f"{layer}.{CODES}")
    assert codes is not None
    editor.store(f"{layer}.{CODES}", codes.T)
    for node in dequantized:
        _set(node, axis=1)
    for gemm in gemms:
        _set(gemm, transB=0)
    for node in turned:
        editor.bypass(node, node.input[0])


def _set(node: NodeProto, **values: int) -> None:
    kept = [item for item in node.attribute if item.name not in values]
    made = [helper.make_attribute(name, value) for name, value in values.items()]
    del node.attribute[:]
    node.attribute.extend([*kept, *made])


def _products(editor: OnnxEditor, layer: str) -> list[NodeProto]:
    """The products that read the layer's codes through a DequantizeLinear."""
    found = [reader for node in editor.readers(f"{layer}.{CODES}") for reader in editor.readers(node.output[0])]
    return [node for node in found if node.op_type in _MULTIPLIES]


def _dynamic_tensor(editor: OnnxEditor, layer: str, stored: StoredLayer) -> None:
    """x · W as DynamicQuantizeLinear, MatMulInteger and a product with both scales: onnxruntime fuses these into one operation."""
    for product in _linear_products(editor, layer):
        source, out, names = product.input[0], product.output[0], _weight_names(editor, product)
        codes, scale, zero = _rows_rounded(editor, source, product)
        zeros = [] if stored.symmetric else [names[2]]
        integers, floats, both = (editor.name(f"{out}_{end}") for end in ("integers", "floats", "scale"))
        last = editor.name(f"{out}_product") if _adds(product) else out
        made = [
            helper.make_node("MatMulInteger", [codes, names[0], zero, *zeros], [integers]),
            helper.make_node("Cast", [integers], [floats], to=TensorProto.FLOAT),
            helper.make_node("Mul", [scale, names[1]], [both]),
            helper.make_node("Mul", [floats, both], [last]),
        ]
        editor.replace(product, [*made, *_bias_added(product, last)])


def _rows_rounded(editor: OnnxEditor, source: str, before: NodeProto) -> tuple[str, str, str]:
    """Codes, scale and zero of a tensor, rounded once for all who read it."""
    for node in editor.readers(source):
        if node.op_type == "DynamicQuantizeLinear":
            return node.output[0], node.output[1], node.output[2]
    codes, scale, zero = (editor.name(f"{source}_{end}") for end in ("codes", "scale", "zero"))
    first = next(node for node in editor.nodes if source in node.input)
    editor.insert(first, [helper.make_node("DynamicQuantizeLinear", [source], [codes, scale, zero])])
    return codes, scale, zero


def _adds(product: NodeProto) -> bool:
    return product.op_type == "Gemm" and len(product.input) > 2 and bool(product.input[2])


def _bias_added(product: NodeProto, made: str) -> list[NodeProto]:
    return [helper.make_node("Add", [made, product.input[2]], [product.output[0]])] if _adds(product) else []


def _linear_products(editor: OnnxEditor, layer: str) -> list[NodeProto]:
    """The matrix products with (K, N) codes; a Gemm among them scales nothing."""
    plain = [node for node in _products(editor, layer) if node.op_type in ("MatMul", "Gemm")]
    return [node for node in plain if not any(attributes(node).get(name, 0) for name in ("transA", "transB"))]


def _weight_names(editor: OnnxEditor, product: NodeProto) -> list[str]:
    weight = editor.maker(product.input[1], "DequantizeLinear")
    assert weight is not None
    return list(weight.input)


def _dynamic_blocks(editor: OnnxEditor, layer: str, stored: StoredLayer) -> None:
    """x · W as com.microsoft.MatMulNBits, which rounds each row of x in blocks while it multiplies."""
    outputs, inputs = stored.codes.shape
    block = next((size for size in (256, 128, 64, 32, 16) if inputs % size == 0), None)
    if stored.bits not in (4, 8) or not stored.symmetric or block is None:
        message = (
            f"layer `{layer}` has {stored.bits} bits and {inputs} inputs; MatMulNBits takes symmetric 4 or 8 bits, and multiples of 16"
        )
        raise Unsupported(message, hint='write it with `dynamic="tensor"`')
    products = _linear_products(editor, layer)
    unsigned = (stored.codes.astype(np.int16) + (1 << (stored.bits - 1))).astype(np.uint8).reshape(outputs, inputs // block, block)
    editor.store(f"{layer}.{CODES}", unsigned if stored.bits == 8 else unsigned[..., ::2] | unsigned[..., 1::2] << 4)
    editor.store(f"{layer}.{SCALE}", np.repeat(stored.scale, inputs // block))
    about = {"K": inputs, "N": outputs, "bits": stored.bits, "block_size": block, "accuracy_level": 4}
    for product in products:
        last = editor.name(f"{product.output[0]}_product") if _adds(product) else product.output[0]
        names = [product.input[0], f"{layer}.{CODES}", f"{layer}.{SCALE}"]
        made = helper.make_node("MatMulNBits", names, [last], domain="com.microsoft", **about)
        editor.replace(product, [made, *_bias_added(product, last)])


_LOWER_DYNAMIC = {"tensor": _dynamic_tensor, "blocks": _dynamic_blocks}


def _signed(editor: OnnxEditor) -> None:
    """Codes of activations less 128: int8 with a zero of 0."""
    for node in [node for node in editor.nodes if node.op_type == "QuantizeLinear"]:
        zero = editor.constant(node.input[2])
        if zero is None or zero.dtype != np.uint8:
            continue
        if int(zero) != 128:
            message = f"`{node.input[0]}` is rounded with the zero `{int(zero)}`; this engine takes symmetric int8 only"
            raise Unsupported(message, hint="quantize with symmetric activations")
        name = editor.store(editor.name(f"{node.output[0]}_zero"), np.zeros((), np.int8))
        for reader in (node, *editor.readers(node.output[0])):
            reader.input[2] = name


def _round_biases(editor: OnnxEditor) -> None:
    """A bias as int32 on the grid of the products that it is added to, where that holds it: engines add it to their integers."""
    for node in [node for node in editor.nodes if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2]:
        source, weight = (editor.maker(name, "DequantizeLinear") for name in node.input[:2])
        bias = editor.constant(node.input[2]) if node.input[2] else None
        if source is None or weight is None or bias is None or bias.dtype != np.float32 or bias.ndim != 1:
            continue
        scales = [editor.constant(found.input[1]) for found in (source, weight)]
        if scales[0] is None or scales[1] is None or not node.input[0] or len(scales[1].reshape(-1)) != len(bias):
            continue
        _round_bias(editor, node, bias, (scales[0] * scales[1]).astype(np.float32).reshape(-1))


def _round_bias(editor: OnnxEditor, node: NodeProto, bias: Array, scale: Array) -> None:
    codes = np.round(bias.astype(np.float64) / scale)
    if not np.isfinite(codes).all() or np.abs(codes).max(initial=0) > _LARGEST:
        return
    wanted = node.input[2]
    names = (
        editor.store(editor.name(f"{wanted}_codes"), codes.astype(np.int32)),
        editor.store(editor.name(f"{wanted}_scale"), scale),
        editor.store(editor.name(f"{wanted}_zero"), np.zeros(len(bias), np.int32)),
    )
    rounded = editor.name(f"{wanted}_rounded")
    editor.insert(node, [helper.make_node("DequantizeLinear", list(names), [rounded], axis=0)])
    node.input[2] = rounded


def _pack_int4(editor: OnnxEditor, layers: Mapping[str, StoredLayer], style: OnnxStyle) -> None:
    """4-bit codes, two in a byte; the opset that has int4 is 21."""
    for layer in (name for name, stored in layers.items() if stored.bits == 4):
        codes = editor.constant(f"{layer}.{CODES}")
        if codes is None or codes.dtype != np.int8:
            continue
        for node in editor.readers(f"{layer}.{CODES}"):
            if style.widen_int4 or node.op_type != "DequantizeLinear":
                wide = editor.name(f"{layer}.{CODES}_int8")
                editor.insert(node, [helper.make_node("Cast", [f"{layer}.{CODES}"], [wide], to=TensorProto.INT8)])
                node.input[:] = [wide if name == f"{layer}.{CODES}" else name for name in node.input]
            else:
                zero = editor.constant(f"{layer}.{ZERO}")
                assert zero is not None
                editor.store(f"{layer}.{ZERO}", int4(zero))
        editor.store(f"{layer}.{CODES}", int4(codes))
        for item in editor.model.opset_import:
            if item.domain in ("", "ai.onnx"):
                item.version = max(item.version, 21)
