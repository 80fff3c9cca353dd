"""What a decoder block is made of, found by watching it run: which layers share an input, and what produces that input.

No architecture is named. Layers share an input when they receive the same tensor object's memory; a producer of an input
is found by a numeric probe: scale its output channels by distinct factors and read the factors at the consumer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qhub.errors import Unsupported
from qhub.skeleton import BlockCall, Enough, run_block

PROBE_TOKENS = 64
_LINEAR_TOLERANCE = 1e-7  # share of the signal that may be left after one factor per channel, float32
_ONLY_LINEAR = "qhub quantizes blocks of linear layers; mixtures of experts (fused) and state-space blocks are not among them yet"
_Key = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Producer:
    """The module whose output channels can be divided by an input scale.

    `rows` (K,) int64: which output channel of `module` feeds each of the K input channels. `offset` is what the module
    adds to its weight before using it (1 for norms of the form x·(1 + w)).
    """

    module: str
    rows: torch.Tensor
    offset: float = 0.0


@dataclass(frozen=True)
class Addition:
    """Where a layer's output is added to the residual stream: the modules that read the stream before and after.

    `before` is `""` where it is what enters the block, `after` is None where the sum is what leaves it.
    """

    before: str
    after: str | None


@dataclass(frozen=True)
class Closing:
    """The child of the block whose output is a layer's output, as it is; `outputs` things are returned (0: no tuple)."""

    child: str
    outputs: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers that read one tensor, in execution order, with the smallest module around them (`""`: the whole block)."""

    layers: tuple[str, ...]
    inputs: int
    container: str
    producer: Producer | None = None
    #: Of a layer alone in its group. Found numerically: what enters a later module is a stream plus this layer's output.
    addition: Addition | None = None
    closing: Closing | None = None


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a matrix product that qhub quantizes: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (K, N): GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def get_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (N, K), whichever way the module stores it; shares memory with it."""
    weight = cast("torch.Tensor", module.weight)
    return weight.t() if is_transposed(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Give `module` the weight (N, K), in the module's own dtype and orientation."""
    stored = cast("torch.Tensor", module.weight)
    weight = weight.t() if is_transposed(module) else weight
    module.weight = nn.Parameter(weight.to(stored.dtype).contiguous(), requires_grad=False)


def observe(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> tuple[LayerGroup, ...]:
    """The layer groups of a float32 `block` in execution order; hidden (1, T, H) float32 is one short input.

    :raises Unsupported: when the block holds matrices that are no linear layers (fused experts), or layers that do not run.
    """
    _refuse_other_matrices(block)
    trace = _trace(block, hidden, call)
    groups = []
    for layers in trace.sharing():
        inputs = get_weight(block.get_submodule(layers[0])).shape[1]
        producer = _find_producer(block, trace, layers, hidden, call)
        addition, closing = (_addition(block, trace, layers[0]), _closing(trace, layers[0])) if len(layers) == 1 else (None, None)
        groups.append(LayerGroup(layers, inputs, _container(layers), producer, addition, closing))
    return tuple(groups)


def each_matrix(block: nn.Module) -> tuple[LayerGroup, ...]:
    """Every linear layer as a group of its own: enough for methods that look at no data; reads no weights.

    :raises Unsupported: when the block holds matrices that are no linear layers.
    """
    _refuse_other_matrices(block)
    names = [name for name, layer in block.named_modules() if is_matrix(layer)]
    return tuple(LayerGroup((name,), get_weight(block.get_submodule(name)).shape[1], name) for name in names)


def _refuse_other_matrices(block: nn.Module) -> None:
    owners = {name: module for name, module in block.named_modules() if not is_matrix(module)}
    bad = [
        f"{name}.{key} {list(parameter.shape)}"
        for name, module in owners.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    if bad:
        message = f"`{type(block).__name__}` holds weights that are not linear layers: {', '.join(bad)}"
        raise Unsupported(message, hint=_ONLY_LINEAR)


@dataclass
class _Trace:
    order: list[str]  # linear layers in execution order
    inputs: dict[str, torch.Tensor]
    makers: dict[_Key, str]  # memory of an output → the module that made it
    outputs: dict[str, torch.Tensor]  # of linear layers
    readers: dict[str, torch.Tensor]  # what enters modules that are no linear layers; `""`: the block
    children: dict[str, Any]  # what the block's own children return
    result: torch.Tensor  # what leaves the block

    def sharing(self) -> list[tuple[str, ...]]:
        groups: dict[_Key, list[str]] = {}
        for name in self.order:
            groups.setdefault(_key(self.inputs[name]), []).append(name)
        return [tuple(names) for names in groups.values()]


def _key(tensor: torch.Tensor) -> _Key:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _trace(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> _Trace:
    trace = _Trace([], {}, {}, {}, {"": hidden}, {}, hidden)
    kept: list[torch.Tensor] = []  # holds every tensor seen, so that no memory is used twice while we watch

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - any module
        if args and isinstance(args[0], torch.Tensor) and is_matrix(module):
            trace.order.append(name)
            trace.inputs[name] = args[0]
            trace.outputs[name] = output.clone()  # a block may add to it in place
            kept.append(args[0])
        elif args and isinstance(args[0], torch.Tensor):
            trace.readers.setdefault(name, args[0].clone())
            kept.append(args[0])
        if isinstance(output, torch.Tensor):
            kept.append(output)
            trace.makers.setdefault(_key(output), name)

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if not any(module.children()):
                hook = module.register_forward_hook(lambda m, a, o, name=name: see(name, m, a, o))
                stack.callback(hook.remove)
        for name, child in block.named_children():
            hook = child.register_forward_hook(lambda _m, _a, output, name=name: trace.children.setdefault(name, output))
            stack.callback(hook.remove)
        trace.result = run_block(block, hidden, call)
    odd = [name for name, module in block.named_modules() if is_matrix(module) and trace.order.count(name) != 1]
    if odd:
        message = f"`{type(block).__name__}` did not run each of its layers once: {', '.join(odd)}"
        raise Unsupported(message, hint="qhub quantizes blocks whose linear layers all run once for every token")
    return trace


def _addition(block: nn.Module, trace: _Trace, layer: str) -> Addition | None:
    """Who reads the stream before and after `layer`'s output is added to it, or None when no sum of the two is seen."""
    own = layer.partition(".")[0]
    output = _tokens(trace.outputs[layer])
    later: list[tuple[str | None, torch.Tensor]] = [*trace.readers.items(), (None, trace.result)]
    for name, before in trace.readers.items():
        child = name.partition(".")[0]
        if _tokens(before).shape != output.shape or (child not in ("", own) and _holds_matrix(block.get_submodule(child))):
            continue  # a child with layers of its own may be replayed, and then does not call its parts
        total = _tokens(before) + output
        tolerance = 1e-5 * float(total.abs().max())
        for reader, after in ((reader, _tokens(value)) for reader, value in later if value is not before):
            if after.shape == total.shape and torch.allclose(after, total, rtol=1e-5, atol=tolerance):
                return Addition(name, reader)
    return None


def _holds_matrix(module: nn.Module) -> bool:
    return any(is_matrix(part) for part in module.modules())


def _closing(trace: _Trace, layer: str) -> Closing | None:
    """The child of the block that returns `layer`'s output and nothing else that holds a value."""
    child, inside = layer.partition(".")[::2]
    returned = trace.children.get(child)
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not inside or not isinstance(parts[0], torch.Tensor) or any(part is not None for part in parts[1:]):
        return None
    if trace.makers.get(_key(parts[0])) != layer:
        return None
    return Closing(child, len(parts) if isinstance(returned, tuple) else 0)


def _tokens(values: torch.Tensor) -> torch.Tensor:
    """values (…, H) as (T, H): some blocks (OPT's) drop the batch dimension on the way."""
    return values.reshape(-1, values.shape[-1] if values.ndim else 1)


def _container(layers: tuple[str, ...]) -> str:
    if len(layers) == 1:
        return layers[0]
    parts = [name.split(".") for name in layers]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _find_producer(block: nn.Module, trace: _Trace, layers: tuple[str, ...], hidden: torch.Tensor, call: BlockCall) -> Producer | None:
    consumer, inputs = layers[0], trace.inputs[layers[0]]
    maker = trace.makers.get(_key(inputs))
    if maker is not None and not is_matrix(block.get_submodule(maker)):
        found = _norm_producer(block, maker, inputs, consumer, hidden, call)
        if found is not None:
            return found
    before = trace.order[: trace.order.index(consumer)]
    for name in reversed(before):
        for rows in _slices(get_weight(block.get_submodule(name)).shape[0], inputs.shape[-1]):
            mapping = _probe(block, name, rows, consumer, inputs, hidden, call)
            if mapping is not None:
                return Producer(name, mapping)
    return None


def _slices(outputs: int, inputs: int) -> Iterator[torch.Tensor]:
    """Rows of a fused matrix that may feed the consumer: all of it, or one of its halves or thirds, the last first."""
    for parts in (1, 2, 3):
        size = outputs // parts
        if outputs % parts == 0 and size <= inputs and inputs % size == 0:
            for part in reversed(range(parts)):
                yield torch.arange(part * size, (part + 1) * size)


def _factors(count: int, device: torch.device) -> torch.Tensor:
    """`count` distinct factors between 1/2 and 2, evenly spaced on a log scale."""
    return torch.exp2(torch.linspace(-1, 1, count, device=device) if count > 1 else torch.ones(1, device=device))


def _probe(
    block: nn.Module, name: str, rows: torch.Tensor, consumer: str, inputs: torch.Tensor, hidden: torch.Tensor, call: BlockCall
) -> torch.Tensor | None:
    factors = _factors(len(rows), inputs.device)
    with scaled_rows(block.get_submodule(name), rows, factors):
        changed = _input_of(block, consumer, hidden, call)
    before, after = inputs.reshape(-1, inputs.shape[-1]).double(), changed.reshape(-1, inputs.shape[-1]).double()
    energy = (before * before).sum(0)
    ratio = (before * after).sum(0) / energy.clamp_min(1e-30)
    left = ((after - ratio * before) ** 2).sum(0)
    alive = energy > 1e-12 * energy.max()
    if not alive.any() or bool((left[alive] > _LINEAR_TOLERANCE * energy[alive]).any()):
        return None
    return _decode(ratio, factors.double(), alive, rows)


def _decode(ratio: torch.Tensor, factors: torch.Tensor, alive: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Which row each channel's ratio names; channels that are silent on the probe follow from their neighbours."""
    middles = (factors[1:] + factors[:-1]) / 2  # factors ascend
    nearest = torch.searchsorted(middles, ratio)
    spacing = (factors[1:] - factors[:-1]).min() if len(factors) > 1 else torch.tensor(0.1)
    if bool(((ratio - factors[nearest]).abs()[alive] > spacing / 3).any()):
        return None
    found = rows.to(nearest.device)[nearest]
    shift = found - torch.arange(len(found), device=found.device)
    if not alive.all():
        if bool((shift[alive] != shift[alive][0]).any()):
            return None
        found = torch.arange(len(found), device=found.device) + shift[alive][0]
    return found


@contextmanager
def scaled_rows(module: nn.Module, rows: torch.Tensor, factors: torch.Tensor) -> Iterator[None]:
    """Multiply output channels `rows` of a linear `module` by `factors` while the context lasts."""
    weight, bias = cast("nn.Parameter", module.weight), cast("nn.Parameter | None", module.bias)
    scaled = get_weight(module).clone()
    scaled[rows] *= factors.unsqueeze(1)
    set_weight(module, scaled)
    if bias is not None:
        shifted = bias.detach().clone()
        shifted[rows] *= factors
        module.bias = nn.Parameter(shifted, requires_grad=False)
    try:
        yield
    finally:
        module.weight = weight
        if bias is not None:
            module.bias = bias


def _input_of(block: nn.Module, layer: str, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Enough

    hook = block.get_submodule(layer).register_forward_pre_hook(catch)
    try:
        with suppress(Enough):
            run_block(block, hidden, call)
    finally:
        hook.remove()
    return seen[0]


def _norm_producer(
    block: nn.Module, maker: str, inputs: torch.Tensor, consumer: str, hidden: torch.Tensor, call: BlockCall
) -> Producer | None:
    module = block.get_submodule(maker)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != inputs.shape[-1:]:
        return None
    rows = torch.arange(len(weight), device=weight.device)
    factors = _factors(len(weight), weight.device)
    for offset in (0.0, 1.0):
        producer = Producer(maker, rows, offset)
        with divided(module, producer, 1 / factors):
            changed = _input_of(block, consumer, hidden, call)
        if torch.allclose(changed, inputs * factors, rtol=1e-4, atol=1e-5 * float(inputs.abs().max())):
            return producer
    return None


@contextmanager
def divided(module: nn.Module, producer: Producer, scale: torch.Tensor) -> Iterator[None]:
    """Divide the output of a norm by `scale` (K,) while the context lasts."""
    weight, bias = cast("nn.Parameter", module.weight), cast("nn.Parameter | None", getattr(module, "bias", None))
    module.weight = nn.Parameter((weight + producer.offset) / scale - producer.offset, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias / scale, requires_grad=False)
    try:
        yield
    finally:
        module.weight = weight
        if bias is not None:
            module.bias = bias
