"""Opening an ONNX file that somebody made: everything that can be wrong with it is said before it is run, naming the node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, external_data_helper

from qhub.errors import DamagedModelError, QhubError, Unsupported

#: The oldest opset in which weights are dequantized per output, and the newest that onnxruntime and we know.
OLDEST, NEWEST = 13, 26
_STANDARD, _OWN = ("", "ai.onnx"), ("com.microsoft", "ai.onnx.ml")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits", "QGemm")


def open_onnx(path: Path) -> onnx.ModelProto:
    """The model with all its weights, at an opset of at least 13.

    :raises DamagedModelError: when the file is no ONNX model, or reads what nothing makes. :raises QhubError: when its external data
        is missing. :raises Unsupported: when an operator or opset is unknown.
    """
    model = _read(path)
    _load_external(model, path)
    _check_opsets(model, path)
    for node in model.graph.node:
        _check_operator(node, model, path)
    _check_complete(model, path)
    return _upgraded(model, path)


def check_float(model: onnx.ModelProto, path: Path) -> None:
    """:raises Unsupported: when the model is quantized already."""
    for node in model.graph.node:
        if node.op_type in _QUANTIZED:
            message = f"`{path}` is quantized already: {described(node)}"
            raise Unsupported(message, hint="give the float model that it was made from")


def described(node: NodeProto) -> str:
    """A node as errors name it."""
    return f"node `{node.name or node.output[0]}` ({node.op_type})"


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise QhubError(f"`{path}` cannot be read: {error.strerror}", hint=f"check the path: `ls -l {path}`") from None
    except Exception:  # noqa: BLE001 - protobuf's class of errors differs between its implementations
        raise DamagedModelError(f"`{path}` is no ONNX model, or a damaged one: its protobuf cannot be parsed", hint=_AGAIN) from None
    if not model.graph.node or not model.graph.output:
        raise DamagedModelError(f"`{path}` holds no graph with operations and outputs (truncated?)", hint=_AGAIN)
    return model


_AGAIN = "export the model again, or download it again"


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read the weights that lie in files beside the model."""
    for tensor in _tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        about = external_data_helper.ExternalDataInfo(tensor)
        location = Path(about.location)
        if location.is_absolute() or ".." in location.parts:
            raise QhubError(f"`{path}` names a file outside its folder: `{location}`", hint="do not use this model")
        file = path.parent / location
        if not file.is_file():
            message = f"`{file}` does not exist, which holds `{tensor.name}` of `{path.name}`"
            raise QhubError(message, hint=f"put `{location}` beside `{path.name}`, or export with the weights inside")
        if (about.offset or 0) + (about.length or 0) > file.stat().st_size:
            raise DamagedModelError(f"`{file}` is too short for `{tensor.name}` of `{path.name}` (truncated?)", hint=_AGAIN)
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except Exception as error:  # noqa: BLE001 - onnx raises its checker's errors and others
            raise DamagedModelError(f"`{tensor.name}` of `{path}` cannot be read from `{file}`: {error}", hint=_AGAIN) from None
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (item.t for item in node.attribute if item.HasField("t"))


def _check_opsets(model: onnx.ModelProto, path: Path) -> None:
    versions = {item.domain: item.version for item in model.opset_import}
    standard = max((versions[domain] for domain in _STANDARD if domain in versions), default=None)
    if standard is None:
        raise DamagedModelError(f"`{path}` does not say which opset of ONNX it uses", hint=_AGAIN)
    if not 1 <= standard <= NEWEST:
        message = f"`{path}` uses opset `{standard}`; the newest known here is {NEWEST}"
        raise Unsupported(message, hint="export the model again with opset 20, or upgrade: `pip install -U onnx onnxruntime qhub-core`")


def _check_operator(node: NodeProto, model: onnx.ModelProto, path: Path) -> None:
    if node.domain in _OWN or any(function.name == node.op_type for function in model.functions):
        return
    if node.domain not in _STANDARD:
        message = f"`{path}`: {described(node)} is of the domain `{node.domain}`, whose operators are not known here"
        raise Unsupported(message, hint="export the model again with standard ONNX operators only")
    if not onnx.defs.has(node.op_type, ""):
        raise Unsupported(
            f"`{path}`: {described(node)} is no ONNX operator", hint="export the model again with standard ONNX operators only"
        )


def _check_complete(model: onnx.ModelProto, path: Path) -> None:
    """Every value that is read is an input, stored, or made by a node before."""
    known = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer} | {""}
    known |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    for node in model.graph.node:
        missing = [name for name in node.input if name not in known]
        if missing:
            message = f"`{path}`: {described(node)} reads `{missing[0]}`, which is neither stored nor made by a node before it"
            raise DamagedModelError(message, hint="export the model again with its weights (`export_params=True` in torch)")
        known.update(node.output)
    for value in model.graph.output:
        if value.name not in known:
            raise DamagedModelError(f"`{path}`: nothing makes its output `{value.name}`", hint=_AGAIN)


def _upgraded(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model at opset 13 or later."""
    item = next(item for item in model.opset_import if item.domain in _STANDARD)
    if item.version >= OLDEST:
        return model
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(model, 17)
    except Exception as error:  # noqa: BLE001 - the converter raises plain RuntimeErrors and others
        first = " ".join(str(error).split())[:200]
        message = f"`{path}` uses opset `{item.version}`, and cannot be brought to 13: {first}"
        raise Unsupported(message, hint="export the model again with opset 20") from None
    return converted
