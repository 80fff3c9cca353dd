"""From a torch program with quantize and dequantize operations to an ONNX file, with exactly its codes, scales and zeros."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset20 as op
from torch import fx

from qhub.errors import QhubError, Unsupported
from qhub.graph.onnx_edit import OnnxEditor
from qhub.graph.onnx_passes import ONNXRUNTIME, OnnxStyle, lower, store_layer
from qhub.graph.onnx_stored import StoredLayer, describe
from qhub.graph.torch_graph import CODES, TorchGraph, export, load_program, module_of, qd
from qhub.graph.torch_ops import get_tensor
from qhub.graph.values import GraphInput

OPSET, IR_VERSION = 20, 10
LARGEST_FILE = 2 * 1000**3  # bytes that one protobuf file holds, with room for what is no weight
_VARYING = {4: {2: "height", 3: "width"}, 3: {1: "sequence"}, 2: {1: "sequence"}}  # by rank and axis


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a file is written: for which engine, its weights in a file beside it (always above 2 GB), and the recipe it comes from.

    `qoperator` writes integer operations (QLinearConv, …) in place of pairs of quantize and dequantize.
    """

    style: OnnxStyle = ONNXRUNTIME
    external_data: bool = False
    qoperator: bool = False
    recipe_digest: str = ""


def write_onnx(program: Path | TorchGraph, out: Path, options: OnnxOptions = OnnxOptions()) -> None:
    """Write the program (a `model.pt2`, its `qhub.json` beside it) as the ONNX file `out`; one without rounding stays float.

    :raises Unsupported: when torch cannot express one of its operations in ONNX, or the engine does not take how it is rounded.
    :raises QhubError: when what was written is no valid model.
    """
    graph = program if isinstance(program, TorchGraph) else open_program(program)
    float_graph, layers, places = _without_rows(graph)
    model = _exported(float_graph)
    editor = OnnxEditor(model)
    _restore(editor, layers, places)
    lower(editor, layers, options.style)
    editor.finish()
    name_axes(model, graph.inputs)
    save_onnx(model, out, layers, options)


def save_onnx(model: onnx.ModelProto, out: Path, layers: Mapping[str, StoredLayer], options: OnnxOptions) -> None:
    """Write a finished model, its layers and recipe in its metadata, and check the file."""
    from qhub.graph.onnx_qoperator import integer_operations

    if any(node.domain == "com.microsoft" for node in model.graph.node) and not any(
        item.domain == "com.microsoft" for item in model.opset_import
    ):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.producer_name, model.ir_version = "qhub", IR_VERSION
    model = integer_operations(model) if options.qoperator else model
    describe(model, layers, options.recipe_digest)
    apart = options.external_data or model.ByteSize() > LARGEST_FILE
    beside = out.with_name(f"{out.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save_model(model, out, save_as_external_data=apart, location=beside.name, size_threshold=1024)
    try:
        onnx.checker.check_model(str(out))
    except onnx.checker.ValidationError as error:
        raise QhubError(f"`{out}` is no valid ONNX model: {str(error).splitlines()[0]}", hint="report this with the model's name") from None


def open_program(path: Path) -> TorchGraph:
    """The graph of a `.pt2` file; its inputs and outputs from the `qhub.json` beside it, else as the program calls them."""
    beside = path.with_name("qhub.json")
    about: Mapping[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    program = load_program(path)
    inputs = tuple(GraphInput(item["name"], tuple(item["shape"]), item["dtype"]) for item in about.get("inputs", ()))
    outputs = about.get("outputs") or [str(name) for name in program.graph_signature.user_outputs]
    return TorchGraph(module_of(program), inputs or _inputs(program), tuple(outputs))


def _inputs(program: torch.export.ExportedProgram) -> tuple[GraphInput, ...]:
    """The inputs as the program has them: what is symbolic varies."""
    names = set(program.graph_signature.user_inputs)
    values = [(node.name, node.meta["val"]) for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return tuple(
        GraphInput(name, tuple(size if isinstance(size, int) else -1 for size in value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in values
    )


def _without_rows(graph: TorchGraph) -> tuple[TorchGraph, dict[str, StoredLayer], list[str]]:
    """The graph with rounded rows taken out, its quantized layers, and which layer each dequantized weight is, in their order."""
    import copy

    module = copy.deepcopy(graph.module)
    layers: dict[str, StoredLayer] = {}
    places: list[str] = []
    for node in list(module.graph.nodes):
        if node.target is qd.dequantize_per_channel.default:
            name = str(node.args[0].target).removesuffix(f".{CODES}")
            places.append(name)
            layers[name] = _stored(module, node, dynamic=any(_rows_before(user) for user in node.users))
    for node in list(module.graph.nodes):
        if node.target is qd.dequantize_per_token.default:
            node.replace_all_uses_with(node.args[0].args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return TorchGraph(module, graph.inputs, graph.outputs), layers, places


def _rows_before(user: fx.Node) -> bool:
    return any(isinstance(source, fx.Node) and source.target is qd.dequantize_per_token.default for source in user.args)


def _stored(module: fx.GraphModule, node: fx.Node, *, dynamic: bool) -> StoredLayer:
    codes, scale, zero = (get_tensor(module, str(source.target)).numpy() for source in node.args[:3] if isinstance(source, fx.Node))
    assert isinstance(node.args[5], int)
    return StoredLayer(codes, scale.astype(np.float32), zero.astype(np.int8), (node.args[5] + 1).bit_length(), dynamic)


def _exported(graph: TorchGraph) -> onnx.ModelProto:
    try:
        with quiet_export():
            program = torch.onnx.export(
                export(graph.module, graph.inputs),
                (),
                dynamo=True,
                verbose=False,
                input_names=[item.name for item in graph.inputs],
                output_names=list(graph.outputs),
                opset_version=OPSET,
                custom_translation_table=_TRANSLATIONS,
            )
    except Exception as error:
        if os.environ.get("QHUB_TRACEBACK"):
            raise
        raise Unsupported(f"torch cannot write the network as ONNX: {_reason(error)}", hint="give the network as an .onnx file") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


def _reason(error: Exception) -> str:
    """The innermost cause: what is around it says how the exporter came there."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """torch's exporter tells of packages that it would also support, and of what it itself calls but should not."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _restore(editor: OnnxEditor, layers: Mapping[str, StoredLayer], places: list[str]) -> None:
    """Every dequantized weight reads its own layer's codes: the exporter makes one of two that are equal, and folds zeros."""
    weights = [node for node in editor.nodes if node.op_type == "DequantizeLinear" and node.output[0].startswith("dequantize_per_channel")]
    weights.sort(key=lambda node: _number(node.output[0]))
    assert len(weights) == len(places), "the exporter dropped a weight"
    for node, layer in zip(weights, places, strict=True):
        node.input[:] = store_layer(editor, layer, layers[layer], 0)


def _number(name: str) -> int:
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0


def name_axes(model: onnx.ModelProto, inputs: tuple[GraphInput, ...]) -> None:
    """Axes that vary are called batch, sequence, height, width, or by their input; the same everywhere."""
    names: dict[str, str] = {}
    for value, item in zip(model.graph.input, inputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                wanted = "batch" if axis == 0 else _VARYING.get(len(item.shape), {}).get(axis, f"{item.name}_{axis}")
                names.setdefault(dim.dim_param, wanted if wanted not in names.values() else f"{item.name}_{axis}")
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.dim_param)


def _quantize(x, scale: float, zero: int, low: int, high: int, dtype: int):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - onnxscript's
    codes = op.QuantizeLinear(x, op.Constant(value_float=scale), op.Cast(op.Constant(value_int=zero), to=2))
    if low == 0 and high == 255:
        return codes
    return op.Clip(codes, op.Cast(op.Constant(value_int=low), to=2), op.Cast(op.Constant(value_int=high), to=2))


def _dequantize(x, scale: float, zero: int, low: int, high: int, dtype: int, out_dtype=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return op.DequantizeLinear(x, op.Constant(value_float=scale), op.Cast(op.Constant(value_int=zero), to=2))


def _dequantize_weight(x, scales, zeros, axis: int, low: int, high: int, dtype: int, out_dtype=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return op.DequantizeLinear(x, scales, op.Cast(zeros, to=3), axis=axis)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    qd.quantize_per_tensor.default: _quantize,
    qd.dequantize_per_tensor.default: _dequantize,
    qd.dequantize_per_channel.default: _dequantize_weight,
}
