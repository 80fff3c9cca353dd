"""A network that rounds as its quantized form will, and can be trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from qhub import ActivationGrid, Batch, GraphResult, QhubError, QTensor, Quantization, TorchGraph
from qhub_qat.initial import activation_grids, weight_scale
from qhub_qat.plan import Plan
from qhub_qat.steps import ActivationStep, WeightStep


class Prepared(nn.Module):
    """A float `graph` with rounding steps at the places of `plan`; it is called as the network it was made from.

    Batch norms are part of the convolutions before them, so there is nothing to freeze. What is trained: weights and biases of
    convolutions, linear layers and norms, and the step sizes.
    """

    def __init__(self, graph: TorchGraph, plan: Plan, grids: dict[str, ActivationGrid], scales: dict[str, torch.Tensor]) -> None:
        """`grids` of the tensors that have their own, `scales` (N,) of each layer to round."""
        super().__init__()
        self.graph, self.plan = graph, plan
        self.weight_steps = {layer: WeightStep(scales[layer], scheme.weight_bits) for layer, scheme in plan.schemes.items()}
        self.activation_steps = {tensor: ActivationStep(grid.scale, grid.zero, grid.bits) for tensor, grid in grids.items()}
        self.network = graph.with_layers({}).module
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self._add_steps()
        self._trained = {op.layer: _make_trainable(self.network, nodes_of(graph.module)[op.name]) for op in graph.ops if op.layer}

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> Any:  # noqa: ANN401 - whatever the network gives
        """The network's outputs, rounded on the way."""
        given = [named[item.name] for item in self.graph.inputs[len(args) :]]
        return self.network(*args, *given)

    def result(self) -> GraphResult:
        """The trained float network, and how it is rounded."""
        weights = {layer: self._stored(layer) for layer in self._trained}
        graph = self.graph.with_layers(weights)
        grids = {tensor: _grid(step) for tensor, step in self.activation_steps.items()}
        codes = {layer: codes_of(weights[layer][0], step) for layer, step in self.weight_steps.items()}
        activations = {point.tensor: grids[point.like or point.tensor] for point in self.plan.points}
        return GraphResult(graph, Quantization(codes, activations, self.plan.readers), dict(self.plan.notes))

    def scales(self) -> list[nn.Parameter]:
        """The step sizes."""
        return [*(step.scale for step in self.weight_steps.values()), *(step.scale for step in self.activation_steps.values())]

    def others(self) -> list[nn.Parameter]:
        """All other parameters that are trained."""
        steps = {id(scale) for scale in self.scales()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in steps]

    def _stored(self, layer: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self._trained[layer]
        found = [None if name is None else self.network.get_parameter(name).detach().cpu().clone() for name in (weight, bias)]
        assert found[0] is not None
        return found[0], found[1]

    def _add_steps(self) -> None:
        nodes = nodes_of(self.network)
        for index, (layer, step) in enumerate(self.weight_steps.items()):
            self.network.add_submodule(f"weight_step_{index}", step)
            for op in self.plan.layers[layer]:
                _insert(nodes[op.name].args[1], f"weight_step_{index}", [nodes[op.name]])
        names = {tensor: f"activation_step_{index}" for index, tensor in enumerate(self.activation_steps)}
        for tensor, name in names.items():
            self.network.add_submodule(name, self.activation_steps[tensor])
        for point in self.plan.points:
            _insert(nodes[point.tensor], names[point.like or point.tensor], [nodes[name] for name in point.readers])
        self.network.recompile()


def started(graph: TorchGraph, plan: Plan, batches: Iterable[Batch]) -> Prepared:
    """The network with steps where its own numbers, on `batches`, say that they cost least.

    :raises QhubError: when there is nothing to round.
    """
    if not plan.schemes:
        raise QhubError("the network has no layer to quantize", hint="`qhub inspect` shows its layers; overrides may exclude them all")
    grids = activation_grids(graph, plan, batches)
    scales = {layer: weight_scale(graph.weight(layer), scheme.weight_bits) for layer, scheme in plan.schemes.items()}
    return Prepared(graph, plan, grids, scales)


def nodes_of(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Name → node."""
    return {node.name: node for node in module.graph.nodes}


def _insert(source: Any, step: str, readers: list[fx.Node]) -> None:  # noqa: ANN401 - an argument of a node
    """Let `readers` read `source` through a step."""
    with source.graph.inserting_after(source):
        rounded = source.graph.call_module(step, (source,))
    for reader in readers:
        reader.replace_input_with(source, rounded)


def _make_trainable(module: fx.GraphModule, node: fx.Node) -> tuple[str, str | None]:
    """The names of a layer's weight and bias, which are parameters that want gradients from now on."""
    stored = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "get_attr"]
    names = [str(argument.target) for argument in stored[:2]]
    for name in names:
        owner, _, last = name.rpartition(".")
        place = module.get_submodule(owner)
        tensor = getattr(place, last)
        delattr(place, last)
        place.register_parameter(last, nn.Parameter(tensor.detach().clone()))
    return names[0], names[1] if len(names) > 1 else None


def codes_of(weight: torch.Tensor, step: WeightStep) -> QTensor:
    """weight (N, …) → its codes (N, K) on the learned grid."""
    with torch.no_grad():
        scale = step.step().detach().cpu().unsqueeze(1)
        half = step.top + 1
        codes = (weight.reshape(len(weight), -1) * (1 / scale)).round_().clamp_(-step.top, step.top)
    return QTensor((codes + half).to(torch.uint8), scale.float(), torch.full_like(scale, float(half)), step.bits, True)


def _grid(step: ActivationStep) -> ActivationGrid:
    return ActivationGrid(float(step.step().detach()), step.zero, step.bits)
