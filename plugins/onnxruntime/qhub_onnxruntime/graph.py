"""An ONNX graph as it is built: nodes in execution order, and weights that go to the data file one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

MODEL, DATA = "model.onnx", "model.onnx.data"
OPSET, IR_VERSION = 23, 11
MICROSOFT = "com.microsoft"
_PAGE = 4096
_INSIDE_BYTES = 1024  # smaller constants stay in the graph: shape inference reads those
_NUMPY_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}


class Graph:
    """A graph under construction in the empty directory `out`; a context, so that the data file is closed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._data = (out / DATA).open("wb")

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._data.close()

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str] | str, domain: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """Append a node, named after its first output; returns that output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(operator, inputs, names, name=names[0], domain=domain, **attributes))
        return names[0]

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """An initializer of float32, integers or bytes; returns its name. The same name again is the first one."""
        return self.raw(name, np.ascontiguousarray(values), _NUMPY_TYPES[values.dtype.name], values.shape)

    def raw(self, name: str, values: NDArray[Any], kind: int, shape: Sequence[int]) -> str:
        """An initializer whose bytes are those of `values`, of ONNX type `kind`."""
        if name in self.initializers:
            return name
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        if values.nbytes < _INSIDE_BYTES:
            tensor.raw_data = values.tobytes()
        else:
            self._place(tensor, values)
        self.initializers[name] = tensor
        return name

    def _place(self, tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
        """Append the bytes to the data file, at a page's beginning so that they can be mapped."""
        self._data.seek(-(-self._data.tell() // _PAGE) * _PAGE)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", self._data.tell()), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(values.reshape(-1).view(np.uint8).data)

    def save(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], facts: dict[str, str]) -> Path:
        """Write the model with metadata `facts`, and let onnx's checker look at it; returns its path."""
        self._data.close()
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qhub")
        helper.set_model_props(model, facts)
        path = self.out / MODEL
        onnx.save_model(model, path)
        onnx.checker.check_model(path)
        return path
