"""A network as an exported torch program: watched while it runs, and rewritten with quantize and dequantize operations.

The operations are PyTorch's `quantized_decomposed` ones, as PT2E writes them, so that other tools read the program too.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from qhub.graph.archive import refuse_code
from qhub.graph.torch_ops import AFFINE_AT, aten, forget_unused, get_tensor, operations, put_tensor, set_layer, simplify
from qhub.graph.values import ActivationGrid, Batch, GraphInput, Op, Quantization
from qhub.quantize.qtensor import QTensor

CODES, SCALE, ZERO = "weight_codes", "weight_scale", "weight_zero"  # what a quantized layer stores
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
qd: Any = torch.ops.quantized_decomposed


class TorchGraph:
    """A network of `inputs`; `module` takes them in that order and returns the tensors called `outputs`."""

    suffix = ".pt2"

    def __init__(self, module: fx.GraphModule, inputs: tuple[GraphInput, ...], outputs: tuple[str, ...]) -> None:
        self.module = module
        self.inputs = inputs
        self.outputs = outputs

    @classmethod
    def of(cls, model: torch.nn.Module, inputs: tuple[GraphInput, ...], outputs: tuple[str, ...]) -> TorchGraph:
        """Export a model, fold its batch norms and take out what only matters for training; the model itself is not changed."""
        return cls.simplified(module_of(export(model.eval(), inputs)), inputs, outputs)

    @classmethod
    def simplified(cls, module: fx.GraphModule, inputs: tuple[GraphInput, ...], outputs: tuple[str, ...]) -> TorchGraph:
        """A program's module with batch norms folded, and without what only matters for training; the program's own is not changed."""
        module = duplicate(module)
        simplify(module)
        return cls(module, inputs, outputs)

    @classmethod
    def load(cls, path: Path, inputs: tuple[GraphInput, ...], outputs: tuple[str, ...]) -> TorchGraph:
        """Open what `save` wrote."""
        return cls(module_of(load_program(path)), inputs, outputs)

    def save(self, path: Path) -> None:
        """Write the program as a `.pt2` file, without what only says where in whose sources an operation came from."""
        program = export(self.module, self.inputs)
        for node in program.graph.nodes:
            for trace in _TRACES:
                node.meta.pop(trace, None)
        torch.export.save(program, path)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The operations in execution order."""
        return operations(self.module)

    def weight(self, layer: str) -> torch.Tensor:
        """The weight of a layer, (N, …) float32: the outputs first."""
        stored = self._argument(layer, 0)
        assert stored is not None
        return stored

    def bias(self, layer: str) -> torch.Tensor | None:
        """The bias of a layer, (N,) float32."""
        return self._argument(layer, 1)

    def layers(self, bits: Mapping[str, int]) -> dict[str, QTensor]:
        """The codes, scales and zeros of quantized layers, read back from a rounded network; `bits` of each layer's codes."""
        found = {}
        for layer, count in bits.items():
            codes, scale, zero = (get_tensor(self.module, f"{layer}.{name}") for name in (CODES, SCALE, ZERO))
            half = 1 << (count - 1)
            rows = (codes.to(torch.int16) + half).to(torch.uint8).reshape(len(codes), -1)
            zeros = (zero + half).float().unsqueeze(1)
            found[layer] = QTensor(rows, scale.unsqueeze(1), zeros, count, bool((zeros == half).all()))
        return found

    def run(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The outputs for one batch."""
        with torch.no_grad():
            found = self._runnable(*self._arguments(batch))
        return tuple(found.values()) if isinstance(found, Mapping) else tuple(found) if isinstance(found, (tuple, list)) else (found,)

    def watch(self, batch: Batch, tensors: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Run one batch and yield the tensors with these names, inputs of the network among them."""
        watcher = _Watcher(self.module, frozenset(tensors))
        with torch.no_grad():
            watcher.run(*self._arguments(batch))
        yield from watcher.seen.items()

    def apply(self, op: Op, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What `op` makes of `x` with another weight (N, …), without its bias."""
        node = self._called(op.name)
        assert callable(node.target)
        with torch.no_grad():
            made = node.target(x, weight.reshape(self.weight(op.layer or "").shape), None, *node.args[3:], **node.kwargs)
        assert isinstance(made, torch.Tensor)
        return made

    def with_layers(self, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> TorchGraph:
        """The same network with other weights and biases."""
        module = duplicate(self.module)
        changed = TorchGraph(module, self.inputs, self.outputs)
        for name, (weight, bias) in layers.items():
            set_layer(module, changed._node(name), weight, bias)
        module.recompile()
        return changed

    def rounded(self, quantization: Quantization) -> TorchGraph:
        """The network with quantize and dequantize operations: weights stored as int8 codes, less 2**(bits − 1)."""
        module = duplicate(self.module)
        changed = TorchGraph(module, self.inputs, self.outputs)
        for layer, bias in quantization.biases.items():
            set_layer(module, changed._node(layer), changed.weight(layer), bias)
        nodes = {node.name: node for node in module.graph.nodes}
        for tensor, names in quantization.readers.items():
            _round_tensor(nodes[tensor], quantization.activations[tensor], [nodes[name] for name in names])
        for op in self.ops:
            if not op.has_weight or op.layer is None:
                continue
            if op.layer in quantization.weights:
                _round_weight(module, nodes[op.name], quantization.weights[op.layer])
            if op.layer in quantization.casts:
                _cast_weight(module, nodes[op.name], getattr(torch, quantization.casts[op.layer]))
            if op.layer in quantization.dynamic:
                _round_rows(nodes[op.name])
        module.graph.eliminate_dead_code()
        forget_unused(module)
        module.recompile()
        return changed

    @cached_property
    def _runnable(self) -> fx.GraphModule:
        """The same numbers in less time: weights dequantized once, and each pair of quantize and dequantize in one operation."""
        module = duplicate(self.module)
        for node in list(module.graph.nodes):
            if node.target is qd.dequantize_per_channel.default:
                _store_dequantized(module, node)
            elif node.target is qd.dequantize_per_tensor.default:
                _round_at_once(node)
        module.graph.eliminate_dead_code()
        forget_unused(module)
        module.recompile()
        return module

    def _node(self, layer: str) -> fx.Node:
        return self._called(next(op.name for op in self.ops if op.layer == layer))

    def _called(self, name: str) -> fx.Node:
        return next(node for node in self._nodes if node.name == name)

    @property
    def _nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def _argument(self, layer: str, which: int) -> torch.Tensor | None:
        """The weight (0) or the bias (1) of a layer."""
        node = self._node(layer)
        place = AFFINE_AT.get(node.target, 1) + which
        stored = node.args[place] if len(node.args) > place else None
        return get_tensor(self.module, str(stored.target)).float() if isinstance(stored, fx.Node) else None

    def _arguments(self, batch: Batch) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(batch[item.name])) for item in self.inputs]


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(module)
        self.names = names
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:  # noqa: ANN401 - whatever a node makes
        made = super().run_node(node)
        if node.name in self.names:
            self.seen[node.name] = made
        return made


def export(model: torch.nn.Module, inputs: tuple[GraphInput, ...]) -> torch.export.ExportedProgram:
    """The program of a model, for any batch and whatever else varies."""
    example = tuple(_example(item) for item in inputs)
    varying = tuple({axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(item.shape) if size < 0} for item in inputs)
    with _quietly():
        return torch.export.export(model, example, dynamic_shapes=varying)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """While this lasts torch does not warn of its own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def duplicate(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the module, weights included."""
    with _quietly():
        return copy.deepcopy(module)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a `.pt2` file.

    :raises QhubError: when loading it could run code.
    """
    refuse_code(path)
    with _quietly():
        return torch.export.load(path)


def module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module that runs; its weights are the program's own."""
    with _quietly():
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _example(item: GraphInput) -> torch.Tensor:
    """Two items of ones; what varies besides the batch is 7 long, which no other axis is likely to be."""
    shape = [size if size >= 0 else 2 if axis == 0 else 7 for axis, size in enumerate(item.shape)]
    return torch.ones(shape, dtype=getattr(torch, item.dtype))


def _round_tensor(node: fx.Node, grid: ActivationGrid, readers: list[fx.Node]) -> None:
    numbers = (grid.scale, grid.zero, 0, (1 << grid.bits) - 1, torch.uint8)
    with node.graph.inserting_after(node):
        codes = node.graph.call_function(qd.quantize_per_tensor.default, (node, *numbers))
    with node.graph.inserting_after(codes):
        rounded = node.graph.call_function(qd.dequantize_per_tensor.default, (codes, *numbers))
    for reader in readers:
        reader.replace_input_with(node, rounded)


def _store_dequantized(module: fx.GraphModule, node: fx.Node) -> None:
    codes, scale, zero = (get_tensor(module, str(argument.target)) for argument in node.args[:3] if isinstance(argument, fx.Node))
    put_tensor(module, name := f"{node.name}_stored", qd.dequantize_per_channel(codes, scale, zero, *node.args[3:]))
    with module.graph.inserting_before(node):
        stored = module.graph.get_attr(name)
    node.replace_all_uses_with(stored)


def _round_at_once(node: fx.Node) -> None:
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    scale, zero, low, high = codes.args[1:5]
    with node.graph.inserting_before(node):
        rounded = node.graph.call_function(torch.fake_quantize_per_tensor_affine, (codes.args[0], scale, zero, low, high))
    node.replace_all_uses_with(rounded)


def _round_weight(module: fx.GraphModule, node: fx.Node, tensor: QTensor) -> None:
    """In place of the weight (N, …): its codes as int8 in its shape, dequantized per output."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    half = 1 << (tensor.bits - 1)
    shape = get_tensor(module, str(source.target)).shape
    owner = str(source.target).removesuffix(".weight")
    stored = {
        f"{owner}.{CODES}": (tensor.codes.to(torch.int16) - half).to(torch.int8).reshape(shape),
        f"{owner}.{SCALE}": tensor.scale[:, 0],
        f"{owner}.{ZERO}": (tensor.zero[:, 0] - half).to(torch.int64),
    }
    for name, value in stored.items():
        put_tensor(module, name, value)
    with module.graph.inserting_before(node):
        attributes = [module.graph.get_attr(name) for name in stored]
        bounds = (0, -half, half - 1, torch.int8)
        weight = module.graph.call_function(qd.dequantize_per_channel.default, (*attributes, *bounds))
    node.args = (node.args[0], weight, *node.args[2:])


def _cast_weight(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    """Store the weight in 16 bits; what is computed stays float32."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    stored = get_tensor(module, str(source.target))
    put_tensor(module, str(source.target), stored.to(dtype))
    with module.graph.inserting_before(node):
        weight = module.graph.call_function(aten.to.dtype, (source, stored.dtype))
    node.args = (node.args[0], weight, *node.args[2:])


def _round_rows(node: fx.Node) -> None:
    """Round the input of a linear layer to int8, each row on a grid of its own, taken while it runs."""
    source, graph = node.args[0], node.graph
    assert isinstance(source, fx.Node)
    with graph.inserting_before(node):
        chosen = graph.call_function(qd.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
        scale, zero = (graph.call_function(operator.getitem, (chosen, index)) for index in range(2))
        numbers = (scale, zero, -128, 127, torch.int8)
        codes = graph.call_function(qd.quantize_per_token.default, (source, *numbers))
        rounded = graph.call_function(qd.dequantize_per_token.default, (codes, *numbers, torch.float32))
    node.args = (rounded, *node.args[1:])
