"""A network as an ONNX file: run by onnxruntime, and rewritten with quantize and dequantize operations as `write_onnx` writes them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from qhub.errors import DamagedModelError
from qhub.graph.onnx_edit import Array, OnnxEditor
from qhub.graph.onnx_lower import OnnxOptions, save_onnx
from qhub.graph.onnx_open import check_float, open_onnx
from qhub.graph.onnx_ops import Place, fold, operations, places
from qhub.graph.onnx_passes import ONNXRUNTIME, lower
from qhub.graph.onnx_round import cast_weight, replace_layer, round_tensor, round_weight
from qhub.graph.onnx_run import Kernel, OnnxRunner, kernel
from qhub.graph.onnx_stored import StoredLayer, describe, layers_of
from qhub.graph.values import Batch, GraphInput, Op, Quantization
from qhub.quantize.qtensor import QTensor


class OnnxGraph:
    """A network of `inputs`; a file whose batch is fixed to 1 is run item by item."""

    suffix = ".onnx"

    def __init__(self, model: onnx.ModelProto, path: Path, layers: Mapping[str, StoredLayer] | None = None) -> None:
        self.model = model
        self.path = path  # where it came from, for what is said of it
        self.stored_layers = dict(layers or {})
        stored = {tensor.name for tensor in model.graph.initializer}
        self.inputs = tuple(_described(value) for value in model.graph.input if value.name not in stored)
        self.outputs = tuple(value.name for value in model.graph.output)

    @classmethod
    def of(cls, path: Path) -> OnnxGraph:
        """Open a float model, fold its batch norms and take out what only matters for training.

        :raises QhubError: when it is damaged, incomplete, quantized already, or has operators that are not known; it names the node.
        """
        model = open_onnx(path)
        check_float(model, path)
        editor = OnnxEditor(model)
        fold(editor)
        return cls(editor.finish(), path)

    @classmethod
    def load(cls, path: Path, inputs: tuple[GraphInput, ...] = (), outputs: tuple[str, ...] = ()) -> OnnxGraph:
        """Open what `save` wrote; `inputs` and `outputs` are what the file should have, empty for whatever it has.

        :raises DamagedModelError: when it has others.
        """
        found = cls(open_onnx(path), path)
        names = [item.name for item in found.inputs]
        if (inputs and [item.name for item in inputs] != names) or (outputs and outputs != found.outputs):
            message = f"`{path}` takes {', '.join(names)} and gives {', '.join(found.outputs)}, which is not what was written"
            raise DamagedModelError(message, hint="quantize the model again")
        return found

    def save(self, path: Path) -> None:
        """Write the model as an `.onnx` file; weights above 2 GB in a file beside it."""
        save_onnx(copy.deepcopy(self.model), path, self.stored_layers, OnnxOptions())

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The operations in execution order."""
        return operations(self._editor, self._places, tuple(item.name for item in self.inputs))

    def weight(self, layer: str) -> torch.Tensor:
        """The weight of a layer, (N, …) float32: the outputs first."""
        place = self._found(layer)
        name, axis = (place.weight, place.axis) if place else (self._affine(layer).input[1], 0)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(self._numbers(name), axis, 0)).astype(np.float32))

    def bias(self, layer: str) -> torch.Tensor | None:
        """The bias of a layer, (N,) float32."""
        place = self._found(layer)
        if place is None:
            node = self._affine(layer)
            name = node.input[2] if len(node.input) > 2 else None
        else:
            name = place.bias
        return torch.from_numpy(self._numbers(name).astype(np.float32)) if name else None

    def layers(self, bits: Mapping[str, int]) -> dict[str, QTensor]:
        """The codes, scales and zeros of quantized layers, read back from a rounded network; `bits` of each layer's codes."""
        model = self.model
        if self.stored_layers:
            model = copy.deepcopy(model)
            describe(model, self.stored_layers, "")
        return {layer: tensor for layer, tensor in layers_of(model, self.path).items() if layer in bits}

    def run(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The outputs for one batch."""
        return tuple(torch.from_numpy(array) for array in self._runner.run(batch))

    def watch(self, batch: Batch, tensors: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Run one batch and yield the tensors with these names, inputs of the network among them."""
        made = [name for name in tensors if name not in batch]
        for name in tensors:
            if name in batch:
                yield name, torch.from_numpy(np.ascontiguousarray(batch[name]))
        if made:
            for name, array in zip(made, self._watcher(frozenset(made), made).run(batch), strict=True):
                yield name, torch.from_numpy(array)

    def apply(self, op: Op, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What `op` makes of `x` with another weight (N, …), without its bias."""
        place = self._places[op.name]
        stored = self._numbers(place.weight)
        rows = weight.reshape(np.moveaxis(stored, place.axis, 0).shape).numpy()
        return torch.from_numpy(self._kernel(op.name)(x.numpy(), np.moveaxis(rows, 0, place.axis)))

    def with_layers(self, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> OnnxGraph:
        """The same network with other weights and biases."""
        editor, found = self._copied()
        for layer, (weight, bias) in layers.items():
            place = next((place for place in found.values() if place.layer == layer), None)
            if place is None:
                node = next(other for other in editor.nodes if other.output[:] == self._affine(layer).output[:])
                place = Place(node, node.input[1], 0)
            replace_layer(editor, place, weight.numpy(), None if bias is None else bias.numpy())
        return OnnxGraph(editor.finish(), self.path)

    def rounded(self, quantization: Quantization) -> OnnxGraph:
        """The network with quantize and dequantize operations, in the form that onnxruntime computes in integers."""
        source = self.with_layers({layer: (self.weight(layer), bias) for layer, bias in quantization.biases.items()})
        editor, found = source._copied()
        reading = {op.name: [place.node for name, place in found.items() if name == op.name] for op in source.ops}
        makers = {node.output[0]: node for node in editor.nodes}
        for tensor, names in quantization.readers.items():
            nodes = [node for name in names for node in reading.get(name) or [makers[name]]]
            round_tensor(editor, tensor, quantization.activations[tensor], nodes)
        stored: dict[str, StoredLayer] = {}
        for place in found.values():
            if place.layer in quantization.casts:
                cast_weight(editor, place, quantization.casts[place.layer])
            if place.layer in quantization.weights:
                shape = tuple(source.weight(place.layer).shape)
                dynamic = place.layer in quantization.dynamic
                stored[place.layer] = StoredLayer.of(quantization.weights[place.layer], shape, dynamic=dynamic)
                round_weight(editor, place, stored[place.layer])
        lower(editor, stored, ONNXRUNTIME)
        return OnnxGraph(editor.finish(), self.path, stored)

    @cached_property
    def _editor(self) -> OnnxEditor:
        return OnnxEditor(self.model)

    @cached_property
    def _places(self) -> dict[str, Place]:
        return places(self._editor)

    def _copied(self) -> tuple[OnnxEditor, dict[str, Place]]:
        editor = OnnxEditor(copy.deepcopy(self.model))
        return editor, places(editor)

    def _found(self, layer: str) -> Place | None:
        return next((place for place in self._places.values() if place.layer == layer), None)

    def _affine(self, layer: str) -> onnx.NodeProto:
        """The norm whose weight has that name; its weight is its second input."""
        names = (layer, f"{layer}.weight")
        return next(node for node in self._editor.nodes if len(node.input) > 1 and node.input[1] in names)

    def _numbers(self, name: str) -> Array:
        numbers = self._editor.constant(name)
        assert numbers is not None
        return numbers

    @cached_property
    def _runner(self) -> OnnxRunner:
        return OnnxRunner(self.model, self.path, self.inputs)

    @cached_property
    def _watchers(self) -> dict[frozenset[str], OnnxRunner]:
        return {}

    def _watcher(self, key: frozenset[str], names: list[str]) -> OnnxRunner:
        """A runner whose outputs are `names`; it is kept, as batches follow."""
        if key not in self._watchers:
            model = copy.deepcopy(self.model)
            del model.graph.output[:]
            model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
            self._watchers.clear()
            self._watchers[key] = OnnxRunner(model, self.path, self.inputs, tuple(names))
        return self._watchers[key]

    @cached_property
    def _kernels(self) -> dict[str, Kernel]:
        return {}

    def _kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            opset = next(item.version for item in self.model.opset_import if item.domain in ("", "ai.onnx"))
            self._kernels[name] = kernel(self._places[name].node, opset)
        return self._kernels[name]


def _described(value: onnx.ValueInfoProto) -> GraphInput:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else -1 for dim in kind.shape.dim)
    return GraphInput(value.name, shape, helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
