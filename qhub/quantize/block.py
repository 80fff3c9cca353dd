"""One decoder block while it is being quantized: its groups, their statistics, folding and replacing weights.

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
from qhub.quantize.observe import LayerGroup, Producer, get_weight, is_transposed, set_weight
from qhub.quantize.qtensor import QTensor
from qhub.skeleton import BlockCall, hidden_of, run_block
from qhub.spool import Spool
from qhub.types import Scheme, last_match

SAMPLE_BATCHES = 2  # batches whose outputs judge an input scale


@dataclass
class LayerChoice:
    """What the recipe says about layers: the scheme of the run and overrides by name pattern (`None`: stay float)."""

    scheme: Scheme
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict)

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
        return {name: self._block.float_weight(name) for name in self._block.chosen(self.shape)}

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
    float_inputs: Mapping[tuple[str, ...], Spool] = field(default_factory=dict)  # by the group's layers
    float_residuals: Mapping[tuple[str, ...], Spool] = field(default_factory=dict)
    probe: tuple[torch.Tensor, BlockCall] | None = None  # a short input on which a fold must not change the output
    results: dict[str, QTensor] = field(default_factory=dict)
    folded: dict[str, torch.Tensor] = field(default_factory=dict)  # layer → float32 weight with scales folded in
    changed: set[str] = field(default_factory=set)  # parameters that folding changed, by name inside the block
    notes: dict[str, str] = field(default_factory=dict)  # layer → what had to be done differently
    _captured: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
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

    def float_weight(self, name: str) -> torch.Tensor:
        """Weight (N, K) float32 of a layer that is not quantized yet."""
        if name in self.folded:
            return self.folded[name]
        return get_weight(self.module.get_submodule(name)).float()

    def observed(self) -> Iterator[LiveGroup]:
        """All groups, with statistics of one pass through the block as it is now."""
        self._collect(self._groups, keep_samples=True)
        yield from self._groups
        self._captured.clear()

    def groups(self) -> Iterator[LiveGroup]:
        """The groups in execution order, each with statistics that see the groups before it already quantized."""
        for group in self._groups:
            self._collect((group,), keep_samples=False)
            yield group
            group.stats = InputStatistics(group.shape.inputs, frozenset())  # gives the matrices back

    def _collect(self, groups: Sequence[LiveGroup], *, keep_samples: bool) -> None:
        for group in groups:
            group.stats = InputStatistics(group.shape.inputs, self.wanted - {"drift"} if keep_samples else self.wanted)
        if self.hidden is None or not self.wanted:
            return
        last = groups[-1].shape.layers[0]
        for batch, hidden in enumerate(self.hidden):
            with ExitStack() as stack:
                for group in groups:
                    tap = _Tap(group, self._float_batch(group, batch), stop=group.shape.layers[0] == last and not keep_samples)
                    if not keep_samples:
                        self._tap_residual(stack, tap, hidden, batch)
                    layer = self.module.get_submodule(group.shape.layers[0])
                    stack.callback(layer.register_forward_pre_hook(tap.see).remove)
                    if keep_samples and batch < SAMPLE_BATCHES:
                        self._watch(stack, group.shape)
                self._run(hidden)
        for group in groups:
            group.stats.finish()

    def _float_batch(self, group: LiveGroup, batch: int) -> torch.Tensor | None:
        spool = self.float_inputs.get(group.shape.layers)
        if spool is None:
            return None
        inputs = spool[batch]
        return inputs if group.input_scale is None else (inputs.float() / group.input_scale)

    def _tap_residual(self, stack: ExitStack, tap: _Tap, hidden: torch.Tensor, batch: int) -> None:
        """Let `tap` know how far the residual stream is behind the float model's where the group adds to it."""
        name, spool = tap.group.shape.residual, self.float_residuals.get(tap.group.shape.layers)
        if name is None or spool is None:
            return
        expected = spool[batch]
        if name == "":
            tap.missed = expected.float() - hidden.float()
            return

        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            tap.missed = expected.float() - args[0].float()

        stack.callback(self.module.get_submodule(name).register_forward_pre_hook(see).remove)

    def _run(self, hidden: torch.Tensor) -> None:
        with suppress(_Enough):
            run_block(self.module, hidden, self.call)

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
        """Divide the group's input by `scale` (K,) in its producer and multiply the weights' columns by it.

        Where the producer is a norm, `scale` is first moved to the nearest one whose folded gain the stored dtype holds
        exactly, so that folding rounds nothing. Kept only if the block's output on the probe stays what it was.
        """
        live = self._live(group)
        producer = live.shape.producer
        if producer is None or not bool(torch.isfinite(scale).all()) or float(scale.min()) <= 0:
            return False
        undo = self._snapshot(live.shape, producer)
        before = self._probe_output()
        if producer.module in {name for shape in self.shapes for name in shape.layers}:
            self._fold_linear(producer, scale)
        else:
            scale = self._fold_norm(producer, scale)
        for name in live.shape.layers:
            self._replace(name, self.float_weight(name) * scale)
        if not _same(before, self._probe_output()):
            undo()
            self.note(group, "input scale not folded: the block's output would change")
            return False
        live.input_scale = scale if live.input_scale is None else live.input_scale * scale
        live.stats.rescale(scale)
        return True

    def _snapshot(self, shape: LayerGroup, producer: Producer) -> Callable[[], None]:
        names = {*shape.layers, producer.module}
        parameters = {name: dict(self.module.get_submodule(name)._parameters) for name in names}
        folded, changed = dict(self.folded), set(self.changed)

        def undo() -> None:
            for name, kept in parameters.items():
                self.module.get_submodule(name)._parameters.update(kept)
            self.folded, self.changed = folded, changed

        return undo

    def _probe_output(self) -> torch.Tensor | None:
        if self.probe is None:
            return None
        hidden, call = self.probe
        return run_block(self.module, hidden.to(_dtype_of(self.module)), call).float()

    def _fold_linear(self, producer: Producer, scale: torch.Tensor) -> None:
        weight = self.float_weight(producer.module)
        divisor = torch.ones(len(weight), device=weight.device)
        divisor[producer.rows.to(weight.device)] = scale.to(weight.device)
        self._replace(producer.module, weight / divisor.unsqueeze(1))
        self._divide_bias(producer.module, divisor)

    def _fold_norm(self, producer: Producer, scale: torch.Tensor) -> torch.Tensor:
        """Divide the norm's output by (nearly) `scale`; returns the scale that was really folded."""
        module = self.module.get_submodule(producer.module)
        weight = module.get_parameter("weight")
        gain = weight.float() + producer.offset
        folded = (gain / scale - producer.offset).to(self.dtype).float()
        exact = gain / (folded + producer.offset)
        usable = torch.isfinite(exact) & (exact > 0)
        exact = torch.where(usable, exact, torch.ones_like(exact))
        module.weight = nn.Parameter(torch.where(usable, folded, weight.float()).to(weight.dtype), requires_grad=False)
        self.changed.add(f"{producer.module}.weight")
        self._divide_bias(producer.module, exact)
        return exact

    def _divide_bias(self, name: str, divisor: torch.Tensor) -> None:
        module = self.module.get_submodule(name)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            divided = (bias.float() / divisor).to(self.dtype).to(bias.dtype)
            module.bias = nn.Parameter(divided, requires_grad=False)
            self.changed.add(f"{name}.bias")

    def _replace(self, name: str, weight: torch.Tensor) -> None:
        self.folded[name] = weight
        set_weight(self.module.get_submodule(name), weight)

    def current(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """What the artifact holds for tensor `name` (inside the block) that is not quantized: `stored` unless folding changed it."""
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.folded:
            weight = self.folded[layer]
            weight = weight.t() if is_transposed(self.module.get_submodule(layer)) else weight
            return weight.to(stored.dtype).contiguous()
        if name in self.changed:
            return self.module.get_parameter(name).detach().to(stored.dtype)
        return stored

    def keep(self, group: Group, result: Mapping[str, QTensor]) -> None:
        """Put the quantized weights of `group` in place."""
        for name, tensor in result.items():
            self.results[name] = tensor
            self.folded.pop(name, None)
            set_weight(self.module.get_submodule(name), tensor.dequantize())

    def note(self, group: Group, text: str) -> None:
        """Record in the report that the group's layers had to be treated differently."""
        self.notes.update(dict.fromkeys(self._live(group).shape.layers, text))


class _Enough(Exception):
    """Stops a forward pass after the last input that statistics need."""


@dataclass
class _Tap:
    """Feeds what enters a group's first layer into its statistics."""

    group: LiveGroup
    float_inputs: torch.Tensor | None
    stop: bool
    missed: torch.Tensor | None = None

    def see(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        self.group.stats.add(args[0], self.float_inputs, self.missed)
        if self.stop:
            raise _Enough


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _same(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    """Whether an output stayed the same up to rounding (bf16 weights are rounded again after a fold)."""
    if before is None or after is None:
        return True
    moved = float((after - before).norm() / before.norm().clamp_min(1e-12))
    return moved < 0.02
