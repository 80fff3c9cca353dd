"""Networks that are no language models, as OpenVINO IR: rounded tensors are `FakeQuantize`, weights integer constants as they are.

The QuantizedModel's program goes through ONNX, which OpenVINO's frontend reads: a pair of quantize and dequantize becomes one
`FakeQuantize`, which is what the plugins compute in integers; nothing is folded to float.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qhub import OPENVINO, OnnxOptions, QhubError, Recipe, write_onnx
from qhub_openvino.export import FACTS, MODEL, name_nodes
from qhub_openvino.lower import lower
from qhub_openvino.packing import unfields
from qhub_openvino.read import IRFile
from qhub_openvino.vendor import ov

if TYPE_CHECKING:
    from qhub import QTensor

NETWORK = "network"  # rt_info: {layer: {bits, axis of the outputs, inputs, dynamic}}
_PROGRAM, _ONNX, _METADATA = "model.pt2", "model.onnx", "qhub.json"
_CODES, _SCALE, _ZERO = ".weight_codes", ".weight_scale", ".weight_zero"


def export_network(source: Path, out: Path, recipe: Recipe) -> None:
    """Write the network of the QuantizedModel folder `source` into the empty folder `out`, with the files beside it.

    :raises QhubError: when the folder holds no network, or OpenVINO knows one of its operations not.
    """
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_PROGRAM, _ONNX, f"{_ONNX}.data"))
    with tempfile.TemporaryDirectory(dir=out) as work:
        file = _onnx_file(source, Path(work))
        model, layers = _converted(file), _described(file)
        lower(model, _cast(source))
        model.set_rt_info(json.dumps(layers, sort_keys=True), [FACTS, NETWORK])
        name_nodes(model)
        ov.save_model(model, out / MODEL, compress_to_fp16=False)
        del model


def network_layers(path: Path) -> Mapping[str, QTensor]:
    """The codes, scales and zeros of a network's quantized layers.

    :raises QhubError: when the files do not hold what they say.
    """
    file = IRFile(path)
    return {name: _read(file, name, about) for name, about in facts(file.model, NETWORK).items()}


def facts(model: ov.Model, name: str) -> Mapping[str, Any]:
    """What we wrote into an IR under `name`; nothing where it is not ours."""
    if not model.has_rt_info([FACTS, name]):
        return {}
    found: Mapping[str, Any] = json.loads(model.get_rt_info([FACTS, name]).astype(str))
    return found


def _cast(source: Path) -> str | None:
    """In which 16 bits the network's weights are stored, if they are."""
    path = source / _METADATA
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return next(iter(said.get("casts", {}).values()), None)


def _onnx_file(source: Path, work: Path) -> Path:
    if (source / _PROGRAM).is_file():
        write_onnx(source / _PROGRAM, work / _ONNX, OnnxOptions(OPENVINO))
        return work / _ONNX
    if (source / _ONNX).is_file():
        return source / _ONNX
    raise QhubError(f"`{source}` has neither `{_PROGRAM}` nor `{_ONNX}`", hint="quantize the model again with `qhub run`")


def _converted(file: Path) -> ov.Model:
    try:
        return ov.Core().read_model(file)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
        raise QhubError(f"OpenVINO does not read the network: {' '.join(lines)[:300]}", hint="`--plugin onnxruntime` carries it") from None


def _described(file: Path) -> dict[str, dict[str, Any]]:
    """Of each quantized layer its bits, the axis of its outputs, its inputs, and whether those are rounded while it runs."""
    import onnx

    model = onnx.load_model(file, load_external_data=False)
    about = next((json.loads(item.value) for item in model.metadata_props if item.key == "qhub.layers"), {})
    readers = {name: node for node in model.graph.node for name in node.input}
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = {}
    for name, said in about.items():
        axis = _output_axis(readers[f"{name}{_CODES}"])
        shape = sizes[f"{name}{_CODES}"]
        found[name] = {**said, "axis": axis, "inputs": math.prod(shape) // shape[axis]}
    return found


def _output_axis(reader: Any) -> int:  # noqa: ANN401 - onnx's node
    """Codes go into a DequantizeLinear, which says the axis, or into a product of integers, which takes (K, N)."""
    if reader.op_type != "DequantizeLinear":
        return 1
    return next((attribute.i for attribute in reader.attribute if attribute.name == "axis"), 1)


def _read(file: IRFile, name: str, about: Mapping[str, Any]) -> QTensor:
    import torch

    from qhub import QTensor

    bits, axis = about["bits"], about["axis"]
    half = 1 << (bits - 1)
    rows = np.moveaxis(_signed(file, f"{name}{_CODES}"), axis, 0)
    scale = np.array(file.constant(f"{name}{_SCALE}").data, dtype=np.float32).reshape(-1, 1)
    zero = np.zeros(scale.shape, np.int8)
    if file.has(f"{name}{_ZERO}"):
        zero = np.broadcast_to(_signed(file, f"{name}{_ZERO}").reshape(-1, 1), scale.shape)
    codes = (rows.astype(np.int16) + half).astype(np.uint8).reshape(len(rows), -1)
    zeros = torch.from_numpy(zero.astype(np.float32) + half)
    return QTensor(torch.from_numpy(codes), torch.from_numpy(scale), zeros, bits, bool((zeros == half).all()))


def _signed(file: IRFile, name: str) -> NDArray[np.int8]:
    """A constant of i8 or i4 in its shape."""
    node = file.constant(name)
    if node.get_element_type().bitwidth == 8:
        return np.array(node.data, dtype=np.int8)
    fields = unfields(node.get_tensor_view().data.reshape(-1).view(np.uint8), 4, int(np.prod(list(node.shape))))
    return ((fields ^ 8).astype(np.int8) - 8).reshape(list(node.shape))
