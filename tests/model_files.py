"""Writers of small valid model files, from the formats' descriptions: GGUF, ONNX (protobuf), TFLite (flatbuffer), PT2 (zip)."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from pathlib import Path

# GGUF: values are (type id, value); a list is (9, (element type id, values)).
_GGUF_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 30: (1, 2)}
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16 = 0, 1, 2, 8, 12, 14, 30
U32, STRING, ARRAY, I32, BOOL = 4, 8, 9, 5, 7


def gguf_text(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _gguf_value(kind, value):
    if kind == STRING:
        return gguf_text(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(_gguf_value(element, item) for item in values)
    return struct.pack(_GGUF_FORMS[kind], value)


def gguf(path: Path, metadata, tensors, *, version=3) -> Path:
    """`metadata`: key → (type, value); `tensors`: name → (type, dims in the file's order)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        header += gguf_text(key) + struct.pack("<I", kind) + _gguf_value(kind, value)
    offset = 0
    for name, (kind, dims) in tensors.items():
        header += gguf_text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
        numbers, size_bytes = _GGUF_BLOCKS[kind]
        offset += -(-math.prod(dims) * size_bytes // numbers // 32) * 32
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(offset))
    return path


def llama_gguf(path: Path, kind=Q4_K, **more) -> Path:
    """A Llama of two blocks, hidden 256, 4 heads of 64 and 2 of them for keys; its matrices are stored as `kind`."""
    metadata = {
        "general.architecture": (STRING, "llama"), "llama.block_count": (U32, 2), "llama.context_length": (U32, 2048),
        "llama.embedding_length": (U32, 256), "llama.attention.head_count": (U32, 4), "llama.attention.head_count_kv": (U32, 2),
        "llama.vocab_size": (U32, 64), "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [f"t{index}" for index in range(64)])), "general.alignment": (U32, 32),
        "tokenizer.ggml.scores": (ARRAY, (6, [0.5] * 64)),
    }  # fmt: skip
    tensors = {"token_embd.weight": (Q6_K, (256, 64)), "output_norm.weight": (F32, (256,))}
    for index in range(2):
        for name, out in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128), ("attn_output", 256), ("ffn_down", 256)):
            tensors[f"blk.{index}.{name}.weight"] = (kind, (512 if name == "ffn_down" else 256, out))
        tensors[f"blk.{index}.ffn_up.weight"] = (kind, (256, 512))
        tensors[f"blk.{index}.attn_norm.weight"] = (F32, (256,))
    return gguf(path, {**metadata, **more}, tensors)


# ONNX: a message is a concatenation of fields.
def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def onnx_tensor(name, dims, kind=1, *, data=None, external=None) -> bytes:
    bits = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 16: 16, 21: 4, 22: 4}.get(kind, 8)
    out = b"".join(field(1, dim) for dim in dims) + field(2, kind) + field(8, name)
    if external is not None:
        return out + b"".join(field(13, field(1, key) + field(2, str(value))) for key, value in external.items()) + field(14, 1)
    return out + field(9, bytes((math.prod(dims) * bits + 7) // 8) if data is None else data)


def onnx_node(op, inputs, outputs, name="", **attributes) -> bytes:
    out = b"".join(field(1, item) for item in inputs) + b"".join(field(2, item) for item in outputs) + field(3, name) + field(4, op)
    for key, value in attributes.items():
        content = field(3, value) + field(20, 2) if isinstance(value, int) else value
        out += field(5, field(1, key) + content)
    return out


def onnx_value(name, shape) -> bytes:
    dims = b"".join(field(1, field(1, dim) if isinstance(dim, int) else field(2, dim)) for dim in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def onnx(path: Path, nodes=(), tensors=(), inputs=None, outputs=None) -> Path:
    graph = b"".join(field(1, node) for node in nodes) + field(2, "g") + b"".join(field(5, tensor) for tensor in tensors)
    graph += b"".join(field(11, onnx_value(*item)) for item in (inputs or {}).items())
    graph += b"".join(field(12, onnx_value(*item)) for item in (outputs or {}).items())
    path.write_bytes(field(1, 10) + field(2, "qhub tests") + field(7, graph) + field(8, field(2, 20)))
    return path


def cnn_onnx(path: Path) -> Path:
    """Two convolutions of a picture and a classifier, in float32."""
    nodes = [
        onnx_node("Conv", ("x", "conv1.weight", "conv1.bias"), ("a",)),
        onnx_node("Relu", ("a",), ("b",)),
        onnx_node("Conv", ("b", "conv2.weight"), ("c",)),
        onnx_node("GlobalAveragePool", ("c",), ("d",)),
        onnx_node("Flatten", ("d",), ("e",)),
        onnx_node("Gemm", ("e", "fc.weight", "fc.bias"), ("y",), transB=1),
    ]
    shapes = {"conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), "conv2.weight": (16, 8, 3, 3), "fc.weight": (10, 16), "fc.bias": (10,)}
    return onnx(path, nodes, [onnx_tensor(*item) for item in shapes.items()], {"x": ("batch", 3, 32, 32)}, {"y": ("batch", 10)})


# TFLite: a table is a list of fields, each None, the bytes of a scalar, or something that is written behind it.
class Table(list):
    """Fields of a flatbuffer table."""


class Vector(list):
    """A flatbuffer list: of tables, or of 32-bit integers."""


def _flat(buffer: bytearray, value) -> int:
    if isinstance(value, Table):
        return _flat_table(buffer, value)
    position = len(buffer)
    data = value if isinstance(value, (str, bytes)) else None
    if data is not None:
        raw = data.encode() if isinstance(data, str) else data
        buffer += struct.pack("<I", len(raw)) + raw + b"\0"
        return position
    buffer += struct.pack("<I", len(value))
    if all(isinstance(item, int) for item in value):
        buffer += struct.pack(f"<{len(value)}i", *value)
        return position
    places = []
    for _ in value:
        places.append(len(buffer))
        buffer += bytes(4)
    for place, item in zip(places, value, strict=True):
        struct.pack_into("<I", buffer, place, _flat(buffer, item) - place)
    return position


def _flat_table(buffer: bytearray, fields: Table) -> int:
    vtable = len(buffer)
    sizes = [0 if item is None else len(item.raw) if isinstance(item, Scalar) else 4 for item in fields]
    buffer += struct.pack("<HH", 4 + 2 * len(fields), 4 + sum(sizes))
    offset = 4
    for size in sizes:
        buffer += struct.pack("<H", offset if size else 0)
        offset += size
    position = len(buffer)
    buffer += struct.pack("<i", position - vtable)
    places = []
    for item, size in zip(fields, sizes, strict=True):
        places.append(len(buffer))
        buffer += item.raw if isinstance(item, Scalar) else bytes(size)
    for item, place in zip(fields, places, strict=True):
        if item is not None and not isinstance(item, Scalar):
            struct.pack_into("<I", buffer, place, _flat(buffer, item) - place)
    return position


class Scalar:
    """A number in the form that `struct` describes."""

    def __init__(self, form, value):
        self.raw = struct.pack(form, value)


def tflite(path: Path, tensors, operators, inputs, outputs) -> Path:
    """`tensors`: (name, shape, type, stored, quantized); `operators`: (code, inputs, outputs)."""
    bits = {0: 32, 1: 16, 2: 32, 9: 8, 17: 4}
    buffers, rows = Vector([Table()]), Vector()
    for name, shape, kind, stored, quantized in tensors:
        index = 0
        if stored:
            buffers.append(Table([bytes((math.prod(shape) * bits[kind] + 7) // 8)]))
            index = len(buffers) - 1
        scales = Table([None, None, Vector([1]), None]) if quantized else None
        rows.append(Table([Vector(shape), Scalar("<b", kind), Scalar("<I", index), name, scales]))
    codes = sorted({code for code, _, _ in operators})
    code_rows = Vector([Table([Scalar("<b", min(code, 127)), None, Scalar("<i", 1), Scalar("<i", code)]) for code in codes])
    nodes = Vector([Table([Scalar("<I", codes.index(code)), Vector(ins), Vector(outs)]) for code, ins, outs in operators])
    subgraph = Table([rows, Vector(inputs), Vector(outputs), nodes, "main"])
    buffer = bytearray(b"\0\0\0\0TFL3")
    root = _flat(buffer, Table([Scalar("<I", 3), code_rows, Vector([subgraph]), "made by hand", buffers]))
    struct.pack_into("<I", buffer, 0, root)
    path.write_bytes(buffer)
    return path


def cnn_tflite(path: Path, kind: int = 0, *, channels: int = 3, static: bool = False) -> Path:
    """Two convolutions and a dense layer; weights are of type `kind`, and with `static` the values between as well."""
    between, weights = (kind if static else 0), kind != 0
    tensors = [
        ("x", (1, 32, 32, channels), between, False, static), ("conv1", (8, 3, 3, channels), kind, True, weights),
        ("bias1", (8,), 2 if static else 0, True, static), ("a", (1, 32, 32, 8), between, False, static),
        ("conv2", (16, 3, 3, 8), kind, True, weights), ("b", (1, 16), between, False, static), ("fc", (10, 16), kind, True, weights),
        ("y", (1, 10), between, False, static), ("shape", (2,), 2, True, False),
    ]  # fmt: skip
    operators = [(3, (0, 1, 2), (3,)), (3, (3, 4), (5,)), (22, (5, 8), (5,)), (9, (5, 6), (7,))]
    return tflite(path, tensors, operators, (0,), (7,))


# PT2: the program as torch.export.save describes it.
def pt2_tensor(shape, kind=7):
    return {"dtype": kind, "sizes": [{"as_int": size} for size in shape], "strides": [], "layout": 7}


def pt2_program(parameters, inputs, nodes=(), *, stack="L__self__,,toy.models.Net"):
    """`parameters`: name → shape; `nodes`: operator names."""
    values = {f"p_{name.replace('.', '_')}": pt2_tensor(shape) for name, shape in parameters.items()}
    values |= {name: pt2_tensor(shape) for name, shape in inputs.items()}
    specs = [{"parameter": {"arg": {"name": f"p_{name.replace('.', '_')}"}, "parameter_name": name}} for name in parameters]
    specs += [{"user_input": {"arg": {"as_tensor": {"name": name}}}} for name in inputs]
    graph = {
        "tensor_values": values,
        "nodes": [{"target": target, "inputs": [], "outputs": [], "metadata": {"nn_module_stack": stack}} for target in nodes],
    }
    return {"graph_module": {"graph": graph, "signature": {"input_specs": specs, "output_specs": []}}, "schema_version": {"major": 8}}


def pt2(path: Path, program, *, layout="new", weight_bytes=0) -> Path:
    text = program if isinstance(program, str) else json.dumps(program)
    names = {
        "new": ("net/models/model.json", "net/data/weights/weight_0"),
        "2.8": ("net/models/model.json", "net/data/weights/model.pt"),
        "old": ("serialized_exported_program.json", "serialized_state_dict.pt"),
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(names[layout][0], text)
        archive.writestr(names[layout][1], bytes(weight_bytes))
    return path


def cnn_pt2(path: Path, **settings) -> Path:
    """Two convolutions of a picture and a classifier."""
    shapes = {"conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), "conv2.weight": (16, 8, 3, 3), "fc.weight": (10, 16), "fc.bias": (10,)}
    nodes = ("torch.ops.aten.conv2d.default", "torch.ops.aten.relu.default", "torch.ops.aten.linear.default")
    return pt2(path, pt2_program(shapes, {"x": (1, 3, 32, 32)}, nodes), weight_bytes=4 * 1554, **settings)
