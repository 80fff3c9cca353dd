"""One decoder block while it is being quantized: its groups, their statistics, and the weights that are already replaced.

`LiveBlock` is what a quantizer sees as `qhub.Block`. It owns the block's module; weights are the module's parameters, in
the forward dtype. While the block runs, two streams of hidden states exist: the float model's and the quantized model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qhub.interfaces import Group
from qhub.quantize.calibrate import InputStatistics
from qhub.quantize.fold import FoldedWeights
from qhub.quantize.linalg import product
from qhub.quantize.observe import LayerGroup, set_weight
from qhub.quantize.qtensor import QTensor
from qhub.quantize.taps import Replay, Tap
from qhub.skeleton import BlockCall, Enough, hidden_of, run_block
from qhub.spool import Spool
from qhub.types import FLOAT, Recipe, Scheme, last_match

OBSERVED_BATCHES = 2  # batches that show what an input scale is to be chosen for
SAMPLE_BATCHES = 1  # of these, batches whose outputs judge it


@dataclass
class LayerChoice:
    """What the recipe says about layers: the scheme of the run and overrides by name pattern (`None`: stay float)."""

    scheme: Scheme
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> LayerChoice:
        """The schemes that a recipe names."""
        overrides = {pattern: None if text == FLOAT else Scheme.parse(text) for pattern, text in recipe.overrides.items()}
        return cls(Scheme.parse(recipe.scheme), overrides)

    def of(self, name: str) -> Scheme | None:
        """The scheme of layer `name` (full name); the last matching pattern wins."""
        pattern = last_match(name, self.overrides)
        return self.scheme if pattern is None else self.overrides[pattern]


class LiveGroup:
    """A group of layers of a live block; see `qhub.interfaces.Group`."""

    def __init__(self, block: LiveBlock, shape: LayerGroup) -> None:
        self.shape = shape
        self._block = block
        self.stats = InputStatistics(shape.inputs, frozenset())
        self.input_scale: torch.Tensor | None = None

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Layer name inside the block → weight (N, K) float32, as the float model has it (folded scales applied)."""
        return {name: self._block.floats.weight(name) for name in self._block.chosen(self.shape)}

    def shortfall(self, name: str) -> torch.Tensor | None:
        """What layer `name` gives less than in the float model, with what it is added to: mean of (y_float − y) xᵀ, (N, K)."""
        weight, stats = self._block.floats.weight(name), self.stats
        if stats.wanted_output is not None and stats.gram is not None:
            return stats.wanted_output - product(weight, stats.gram)
        return None if stats.drift is None else product(weight, stats.drift)

    @property
    def foldable(self) -> bool:
        """Whether the input's producer can take an input scale."""
        return self.shape.producer is not None and bool(self._block.chosen(self.shape))

    def tied(self, values: torch.Tensor) -> torch.Tensor:
        """values (K,) averaged (geometric mean) over input channels that one producer channel feeds."""
        producer = self.shape.producer
        if producer is None or int(producer.rows.bincount().max()) == 1:
            return values
        rows = producer.rows.to(values.device)
        count = int(rows.max()) + 1
        logs = torch.zeros(count).index_add_(0, rows, values.clamp_min(1e-12).log())
        members = torch.zeros(count).index_add_(0, rows, torch.ones_like(values))
        return (logs / members.clamp_min(1)).exp()[rows]

    def output_error(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Mean squared change of the containing module's output, over sampled batches."""
        return self._block.output_error(self.shape, weights)


@dataclass
class FloatSide:
    """What the float model saw in one block, by the layers of a group, a batch per entry: see `Tap`."""

    inputs: dict[tuple[str, ...], Spool] = field(default_factory=dict)
    sums: dict[tuple[str, ...], Spool] = field(default_factory=dict)


@dataclass
class LiveBlock:
    """Block `index`, called `name`, filled with weights; see `qhub.interfaces.Block`."""

    index: int
    name: str
    dtype: torch.dtype
    module: nn.Module
    call: BlockCall
    shapes: Sequence[LayerGroup]
    choice: LayerChoice
    hidden: Spool | None  # the quantized model's hidden states that enter the block; None: no data needed
    wanted: frozenset[str] = frozenset()
    float_side: FloatSide = field(default_factory=FloatSide)
    probe: tuple[torch.Tensor, BlockCall] | None = None  # a short input on which a fold must not change the output
    new_spool: Callable[[str], Spool] | None = None  # a place for what is kept to replay finished parts; None: run them again
    results: dict[str, QTensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # layer → what had to be done differently
    _captured: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.floats = FoldedWeights(self.module, self.dtype, self.probe)
        self.replay = Replay(self.module, self.new_spool)
        self._groups = tuple(LiveGroup(self, shape) for shape in self.shapes if self.chosen(shape))

    def chosen(self, shape: LayerGroup) -> tuple[str, ...]:
        """The layers of a group that are to be quantized."""
        return tuple(name for name in shape.layers if self.choice.of(f"{self.name}.{name}") is not None)

    def _live(self, group: Group) -> LiveGroup:
        """`group` as this block knows it; a quantizer gets its groups from here."""
        assert isinstance(group, LiveGroup)
        return group

    def schemes(self, group: Group) -> Mapping[str, Scheme]:
        """The scheme of each layer of `group`."""
        pairs = ((name, self.choice.of(f"{self.name}.{name}")) for name in self.chosen(self._live(group).shape))
        return {name: scheme for name, scheme in pairs if scheme is not None}

    def observed(self) -> Iterator[LiveGroup]:
        """All groups, with statistics of one pass of sampled batches through the block as it is now."""
        for group in self._groups:
            group.stats = InputStatistics(group.shape.inputs, self.wanted - {"shortfall"} | {"abs_mean"})
        if self.hidden is not None and self.wanted:
            for batch in range(min(OBSERVED_BATCHES, len(self.hidden))):
                self._observe_batch(batch, self.hidden[batch])
            for group in self._groups:
                group.stats.finish()
        yield from self._groups
        self._captured.clear()

    def _observe_batch(self, batch: int, hidden: torch.Tensor) -> None:
        with ExitStack() as stack:
            for group in self._groups:
                Tap(group.stats, stops=False).attach(stack, self.module.get_submodule(group.shape.layers[0]), None)
                if batch < SAMPLE_BATCHES:
                    self._watch(stack, group.shape)
            self.run(batch, hidden)

    def groups(self) -> Iterator[LiveGroup]:
        """The groups in execution order, each with statistics that see the groups before it already quantized."""
        self.replay.end()
        for group in self._groups:
            self._collect(group)
            yield group
            group.stats = InputStatistics(group.shape.inputs, frozenset())  # gives the matrices back
            self.replay.begin(group.shape.closing, group.shape.layers[0])

    def _collect(self, group: LiveGroup) -> None:
        group.stats = InputStatistics(group.shape.inputs, self.wanted)
        if self.hidden is None or not self.wanted:
            return
        layer, record = self.module.get_submodule(group.shape.layers[0]), self.replay.recorder(group.shape.closing)
        for batch, hidden in enumerate(self.hidden):
            tap = Tap(group.stats, stops=True, record=record)
            reader = self._compare(tap, group, batch, hidden)
            with ExitStack() as stack, suppress(Enough):
                tap.attach(stack, layer, reader)
                self.run(batch, hidden)
        group.stats.finish()

    def _compare(self, tap: Tap, group: LiveGroup, batch: int, hidden: torch.Tensor) -> nn.Module | None:
        """Let `tap` know what the float model has in its place; returns the module that reads the stream, if one must be asked."""
        layers, addition = group.shape.layers, group.shape.addition
        if addition is not None and layers in self.float_side.sums:
            tap.float_sum = self.float_side.sums[layers][batch]
            tap.stream = hidden if addition.before == "" else None
            return self.module.get_submodule(addition.before) if addition.before else None
        if layers in self.float_side.inputs:
            inputs = self.float_side.inputs[layers][batch]
            tap.float_inputs = inputs if group.input_scale is None else inputs.float() / group.input_scale
        return None

    def run(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run the block as it is now on batch number `batch`, (B, T, H) → (B, T, H)."""
        self.replay.batch = batch
        return run_block(self.module, hidden, self.call)

    def _watch(self, stack: ExitStack, shape: LayerGroup) -> None:
        """Keep what the group's container was called with and gave, to judge candidates by its output later."""
        if len(shape.layers) == 1:
            return
        container = self.module.get_submodule(shape.container)

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
            self._captured.setdefault(shape.container, []).append((args, kwargs, hidden_of(output)))

        stack.callback(container.register_forward_hook(keep, with_kwargs=True).remove)

    def output_error(self, shape: LayerGroup, weights: Mapping[str, torch.Tensor]) -> float:
        """Mean squared change of the container's output with `weights` in place; the module is left as it was."""
        modules = {name: self.module.get_submodule(name) for name in weights}
        before = {name: module.weight for name, module in modules.items()}
        container = self.module.get_submodule(shape.container)
        total, count = 0.0, 0
        try:
            for name, module in modules.items():
                set_weight(module, weights[name])
            for args, kwargs, expected in self._captured[shape.container]:
                output = hidden_of(container(*args, **kwargs))
                total += float((output.float() - expected.float()).square().sum())
                count += expected.numel()
        finally:
            for name, module in modules.items():
                module.weight = before[name]
        return total / max(count, 1)

    def fold(self, group: Group, scale: torch.Tensor) -> bool:
        """Divide the group's input by (nearly) `scale` (K,) in its producer and multiply the weights' columns by it."""
        live = self._live(group)
        folded = self.floats.fold(live.shape, scale)
        if folded is None:
            self.note(group, "input scale not folded: the block's output would change")
            return False
        live.input_scale = folded if live.input_scale is None else live.input_scale * folded
        live.stats.rescale(folded)
        return True

    def keep(self, group: Group, result: Mapping[str, QTensor]) -> None:
        """Put the quantized weights of `group` in place."""
        for name, tensor in result.items():
            self.results[name] = tensor
            self.floats.weights.pop(name, None)
            if self.hidden is not None:  # else nothing runs the block any more
                set_weight(self.module.get_submodule(name), tensor.dequantize())
        self.replay.changed(result)

    def note(self, group: Group, text: str) -> None:
        """Record in the report that the group's layers had to be treated differently."""
        self.notes.update(dict.fromkeys(self._live(group).shape.layers, text))
