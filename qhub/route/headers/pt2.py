"""PT2 archives of `torch.export.save`: the JSON description of the program; tensors and pickles inside are never opened.

Two layouts: since torch 2.8 `<name>/models/<model>.json` beside `data/weights/`, before it `serialized_exported_program.json`.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from qhub.errors import DamagedModelError
from qhub.route.config import task_of_architecture
from qhub.route.headers.reader import broken
from qhub.route.layers import block_names, layer_shapes, main_dtype
from qhub.types import LayerShape, ModelProfile, Task
from qhub.weights import ITEM_BYTES, TensorInfo

_PROGRAM = re.compile(r"(?:[^/]+/)?(?:models/[^/]+\.json|serialized_exported_program\.json)")
_WEIGHTS = re.compile(r"(?:[^/]+/)?(?:data/(?:weights|constants)/(?!.*\.json$).*|serialized_(?:state_dict|constants)\.(?:pt|json))")
_MAX_JSON_BYTES = 1 << 28
#: ScalarType of torch's schema → safetensors' name of the same format.
_DTYPES = {
    1: "U8",
    2: "I8",
    3: "I16",
    4: "I32",
    5: "I64",
    6: "F16",
    7: "F32",
    8: "F64",
    12: "BOOL",
    13: "BF16",
    29: "F8_E4M3",
    30: "F8_E5M2",
}
_QUANTIZED = ("quantized_decomposed", "torchao", "quantized.")
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    RuntimeError,
    NotImplementedError,
    EOFError,
    OverflowError,
    KeyError,
)


def profile_pt2(path: Path) -> ModelProfile:
    """Profile an exported program.

    :raises DamagedModelError: when the archive is truncated, holds no program, or one that says nothing of its tensors.
    """
    program, weight_bytes = _read(path)
    tensors = _tensors(path, program)
    layers = layer_shapes(tensors, {})
    architecture = _architecture(_nodes(path, program))
    return ModelProfile(
        source=path.name,
        path=str(path),
        task=_task(path, program, architecture, layers),
        architecture=architecture,
        parameters=sum(prod(layer.shape) for layer in layers),
        dtype=main_dtype(layers),
        weight_bytes=weight_bytes,
        layers=layers,
        blocks=len(block_names(layer.name for layer in layers if layer.kind == "linear")) or None,
        quantization="pt2e" if any(word in target for target in _targets(path, program) for word in _QUANTIZED) else None,
        format="pt2",
    )


def _read(path: Path) -> tuple[Mapping[str, Any], int]:
    """The program, and the bytes of all weights by the archive's directory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            programs = [entry for entry in entries if _PROGRAM.fullmatch(entry.filename)]
            if len(programs) != 1:
                raise broken(path, "PT2", f"it holds `{len(programs)}` programs")
            if programs[0].file_size > _MAX_JSON_BYTES:
                raise broken(path, "PT2", f"its program claims `{programs[0].file_size}` bytes")
            with archive.open(programs[0]) as file:
                program = json.loads(file.read(_MAX_JSON_BYTES))
            size_bytes = sum(entry.file_size for entry in entries if _WEIGHTS.fullmatch(entry.filename))
    except (*_UNREADABLE, RecursionError) as error:
        raise broken(path, "PT2", f"it cannot be read ({str(error)[:80]})") from None
    except OSError as error:
        if error.filename is not None:  # the file itself, not what it holds
            raise
        raise broken(path, "PT2", "it cannot be read (truncated?)") from None
    if not isinstance(program, dict):
        raise broken(path, "PT2", "its program is not a JSON object")
    return program, size_bytes


def _at(path: Path, value: object, *keys: str) -> Any:  # noqa: ANN401 - JSON
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise broken(path, "PT2", f"its program has no `{'.'.join(keys)}`")
        value = value[key]
    return value


def _tensors(path: Path, program: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Parameters and buffers by the names they have in the model, with the shapes that the graph gives them."""
    values = _at(path, program, "graph_module", "graph", "tensor_values")
    found = {}
    for name, value in _stored_names(path, program):
        try:
            meta = values[value]
            shape = tuple(size["as_int"] for size in meta["sizes"])
            dtype = _DTYPES.get(meta["dtype"], "unknown")
        except (KeyError, TypeError, IndexError):
            raise broken(path, "PT2", f"the shape of `{name[:60]}` is not given") from None
        if not all(isinstance(size, int) and 0 <= size < 1 << 62 for size in shape):
            raise broken(path, "PT2", f"the shape of `{name[:60]}` is `{shape}`")
        found[name] = TensorInfo(name, dtype, shape, path, 0, prod(shape) * ITEM_BYTES.get(dtype, 0))
    return found


def _stored_names(path: Path, program: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in the model, name in the graph) of every stored tensor."""
    specs = _at(path, program, "graph_module", "signature", "input_specs")
    if not isinstance(specs, list):
        raise broken(path, "PT2", "its inputs are not a list")
    for spec in specs:
        for kind, key in (("parameter", "parameter_name"), ("buffer", "buffer_name"), ("tensor_constant", "tensor_constant_name")):
            if isinstance(spec, dict) and kind in spec:
                name, value = _at(path, spec, kind, key), _at(path, spec, kind, "arg", "name")
                if not isinstance(name, str) or not isinstance(value, str):
                    raise broken(path, "PT2", f"a {kind} is called `{str(name)[:60]}`")
                yield name, value


def _nodes(path: Path, program: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    nodes = _at(path, program, "graph_module", "graph", "nodes")
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise broken(path, "PT2", "its operators are not a list")
    return nodes


def _targets(path: Path, program: Mapping[str, Any]) -> set[str]:
    return {str(node.get("target")) for node in _nodes(path, program)}


def _architecture(nodes: list[Mapping[str, Any]]) -> str:
    """The class that was exported, from where the first operator that says so came."""
    for node in nodes:
        metadata = node.get("metadata")
        stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
        if isinstance(stack, str) and stack:
            return stack.split(";", 1)[0].rpartition(",")[2].rpartition(".")[2] or "unknown"
    return "unknown"


def _task(path: Path, program: Mapping[str, Any], architecture: str, layers: tuple[LayerShape, ...]) -> Task:
    """By the class that was exported; else images, where most weights are convolutions and an input is a picture."""
    known = task_of_architecture(architecture)
    if known != "unknown":
        return known
    convolutions = sum(layer.kind == "conv" for layer in layers)
    matrices = sum(layer.kind in ("linear", "head") or (layer.kind == "other" and len(layer.shape) == 2) for layer in layers)
    try:
        pictures = any(_is_picture(shape) for shape in _inputs(program))
    except (KeyError, TypeError, AttributeError):
        raise DamagedModelError(f"`{path}` does not say what its inputs are", hint="export it again") from None
    return "vision" if pictures and convolutions > matrices else "unknown"


def _inputs(program: Mapping[str, Any]) -> Iterator[list[Any]]:
    graph = program["graph_module"]["graph"]
    for spec in program["graph_module"]["signature"]["input_specs"]:
        name = spec.get("user_input", {}).get("arg", {}).get("as_tensor", {}).get("name")
        if name is not None:
            yield [size.get("as_int") for size in graph["tensor_values"][name]["sizes"]]


def _is_picture(shape: list[Any]) -> bool:
    return len(shape) == 4 and 3 in (shape[1], shape[3])
