"""Running ONNX models with onnxruntime while they are being quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from qhub.errors import QhubError, Unsupported
from qhub.graph.onnx_edit import Array
from qhub.graph.values import Batch, GraphInput

Kernel = Callable[[Array, Array], Array]
_LARGEST_MESSAGE = 300


class OnnxRunner:
    """A model opened for running; `names` are the outputs it gives, None for its own."""

    def __init__(self, model: onnx.ModelProto, path: Path, inputs: tuple[GraphInput, ...], names: tuple[str, ...] | None = None) -> None:
        self._session = open_session(model, path)
        self._model, self._path, self._inputs, self._names = model, path, inputs, list(names) if names else None

    def run(self, batch: Batch) -> tuple[NDArray[Any], ...]:
        """The outputs for one batch; where the file's batch is fixed, it is run in pieces of that size.

        :raises QhubError: when the arrays do not fit what the file takes.
        """
        feed = {item.name: self._fitting(item, batch) for item in self._inputs}
        sizes = {item.shape[0] for item in self._inputs if item.shape and item.shape[0] > 0}
        if not sizes:
            return self._call(feed)
        step, count = min(sizes), len(next(iter(feed.values())))
        pieces = [self._call({name: array[start : start + step] for name, array in feed.items()}) for start in range(0, count, step)]
        return tuple(np.concatenate(parts) if parts[0].ndim else parts[0] for parts in zip(*pieces, strict=True))

    def _call(self, feed: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        try:
            return tuple(self._session.run(self._names, feed))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a class per status
            raise QhubError(
                f"`{self._path}` cannot be run: {_said(error)}", hint="check the shapes of the data against the model"
            ) from None

    def _fitting(self, item: GraphInput, batch: Batch) -> NDArray[Any]:
        if item.name not in batch:
            message = f"`{self._path}` takes `{item.name}`, which the data lacks: it has {', '.join(batch)}"
            raise QhubError(message, hint="name the arrays of the data as the model's inputs")
        array, fixed = batch[item.name], item.shape[0] if item.shape else -1
        fits = array.ndim == len(item.shape) and all(
            size in (-1, found) for size, found in zip(item.shape[1:], array.shape[1:], strict=True)
        )
        if not fits or (fixed > 0 and len(array) % fixed):
            wanted, found = ("×".join("any" if size < 0 else str(size) for size in shape) for shape in (item.shape, array.shape))
            message = f"`{item.name}` of `{self._path}` takes {wanted}; the data is {found}"
            raise QhubError(message, hint="check the preprocessing of the data, or export the model with a dynamic batch")
        return np.ascontiguousarray(array, dtype=item.dtype)


def open_session(model: onnx.ModelProto, path: Path, *, plain: bool = False) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """A session on the CPU; plain: nothing is rewritten.

    :raises Unsupported: when onnxruntime has no kernel for one of the model's operations.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong is raised
    if plain:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a class per status
        hint = "export the model again with standard operators (opset 20)"
        raise Unsupported(f"onnxruntime does not run `{path}`: {_said(error)}", hint=hint) from None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LARGEST_MESSAGE else f"{text[:_LARGEST_MESSAGE]} …"


def kernel(node: NodeProto, opset: int) -> Kernel:
    """The product of `node` as a function of what it reads and a weight as the file holds it, without a bias."""
    product = NodeProto.FromString(node.SerializeToString())
    product.input[:], product.output[:] = ["x", "weight"], ["y"]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "weight", "y")]
    graph = helper.make_graph([product], "product", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = open_session(model, Path(node.name or node.output[0]))

    def apply(x: Array, weight: Array) -> Array:
        made: Array = session.run(None, {"x": np.ascontiguousarray(x), "weight": np.ascontiguousarray(weight)})[0]
        return made

    return apply
