"""What each node of an exported torch program is, in the words of `values.Op`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qhub.graph.values import Kind, Op

aten: Any = torch.ops.aten  # its operators are found by name
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 1, aten.conv3d.default: 1, aten.conv1d.padding: 1, aten.conv2d.padding: 1}
LINEAR = aten.linear.default
_CLIPS = {
    aten.relu.default: (0.0, None), aten.relu_.default: (0.0, None), aten.relu6.default: (0.0, 6.0), aten.relu6_.default: (0.0, 6.0),
    aten.hardtanh.default: None, aten.hardtanh_.default: None, aten.clamp.default: None, aten.clamp_min.default: None,
}  # fmt: skip
_JOINS = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.sub.Tensor}
_CARRIES = {
    aten.max_pool2d.default, aten.max_pool1d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.pad.default, aten.constant_pad_nd.default, aten.expand.default, aten.contiguous.default,
    aten.pixel_shuffle.default, aten.upsample_nearest2d.vec,
}  # fmt: skip
_POOLS = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
_NORMS = {
    aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.softmax.int, aten._softmax.default,
    aten.rms_norm.default, aten.batch_norm.default, aten.log_softmax.int,
}  # fmt: skip
#: Which argument of a norm is its weight; the next one is its bias.
AFFINE_AT = {aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.rms_norm.default: 2}
_NOTHING = {aten.dropout.default, aten.dropout_.default, aten.alias.default, aten.detach.default, aten.feature_dropout.default}


def operations(module: fx.GraphModule) -> tuple[Op, ...]:
    """The operations that depend on the network's input, in execution order."""
    found: dict[fx.Node, Op] = {}
    live = {node for node in module.graph.nodes if node.op == "placeholder"}
    for node in module.graph.nodes:
        inputs = [source for source in node.all_input_nodes if source in live]
        if node.op == "call_function" and inputs:
            live.add(node)
            found[node] = _operation(module, node, tuple(source.name for source in inputs))
    return tuple(found.values())


def _operation(module: fx.GraphModule, node: fx.Node, inputs: tuple[str, ...]) -> Op:
    if node.target in CONVOLUTIONS or node.target is LINEAR:
        kind: Kind = "linear" if node.target is LINEAR else "conv"
        return Op(node.name, kind, inputs, _layer(node), -1 if kind == "linear" else 1) if _layer(node) else Op(node.name, "other", inputs)
    if node.target in _CLIPS:
        low, high = _bounds(node)
        return Op(node.name, "clip" if low is not None and low <= 0 else "other", inputs, low=low, high=high)
    kinds: Mapping[Kind, set[Any]] = {"join": _JOINS, "carry": _CARRIES, "pool": _POOLS, "norm": _NORMS}
    kind = next((kind for kind, targets in kinds.items() if node.target in targets), "other")
    if kind == "carry" and not _pads_with_zero(node):
        kind = "other"
    return Op(node.name, kind, inputs, _layer(node) if kind == "norm" and node.target in AFFINE_AT else None)


def _layer(node: fx.Node) -> str | None:
    """The name of the weight that is multiplied with, if it is a stored one."""
    place = AFFINE_AT.get(node.target, 1)
    weight = node.args[place] if len(node.args) > place else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return str(weight.target).removesuffix(".weight")


def _bounds(node: fx.Node) -> tuple[float | None, float | None]:
    """The bounds of a clip."""
    known = _CLIPS[node.target]
    if known is not None:
        return known
    given = [value if isinstance(value, (int, float)) else None for value in node.args[1:3]]
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        given = given or [-1.0, 1.0]
    low, high = (*given, None, None)[:2]
    return low, high


def _pads_with_zero(node: fx.Node) -> bool:
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return True
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    value = node.args[-1] if len(node.args) > (3 if node.target is aten.pad.default else 2) else 0
    return mode == "constant" and not value


def simplify(module: fx.GraphModule) -> None:
    """Take out what does nothing when a network is only run, and fold batch norms into the convolutions before them."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.op == "call_function" and node.target is aten.batch_norm.default:
            _fold_batch_norm(module, node)
    module.graph.eliminate_dead_code()
    forget_unused(module)
    module.recompile()


def forget_unused(module: fx.GraphModule) -> None:
    """Take the parameters and buffers out of the module that no operation reads: they would be stored."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers(remove_duplicate=False))]:
        if name not in used:
            owner, _, last = name.rpartition(".")
            delattr(module.get_submodule(owner), last)


def _fold_batch_norm(module: fx.GraphModule, norm: fx.Node) -> None:
    """y = (conv(x) − mean) · factor + bias is a convolution: with weight · factor, and the rest as its bias. Exact but for rounding."""
    before = norm.args[0]
    if not isinstance(before, fx.Node) or before.target not in CONVOLUTIONS or len(before.users) != 1 or not _layer(before):
        return
    gamma, beta, mean, variance = (_stored(module, argument) for argument in norm.args[1:5])
    if mean is None or variance is None or _readers_of_weight(before) != 1:
        return
    factor = torch.rsqrt(variance.double() + float(norm.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma.double()
    weight, bias = _stored(module, before.args[1]), _stored(module, before.args[2] if len(before.args) > 2 else None)
    assert weight is not None
    shift = -mean.double() * factor + (0 if beta is None else beta.double()) + (0 if bias is None else bias.double() * factor)
    folded = weight.double() * factor.reshape(-1, *(1,) * (weight.dim() - 1))
    set_layer(module, before, folded.to(weight.dtype), shift.to(weight.dtype))
    norm.replace_all_uses_with(before)
    module.graph.erase_node(norm)


def _readers_of_weight(node: fx.Node) -> int:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return sum(1 for other in node.graph.nodes if other.op == "get_attr" and other.target == weight.target for _ in other.users)


def _stored(module: fx.GraphModule, argument: Any) -> torch.Tensor | None:  # noqa: ANN401 - an argument of a node
    return get_tensor(module, str(argument.target)) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def get_tensor(module: fx.GraphModule, name: str) -> torch.Tensor:
    """The parameter or buffer of that name."""
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    assert isinstance(found, torch.Tensor)
    return found.detach()


def put_tensor(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> None:
    """Store a tensor under that name, as a parameter if there is a parameter, else as a buffer."""
    owner, _, last = name.rpartition(".")
    place = _submodule(module, owner)
    is_parameter = last in place._parameters
    place._parameters.pop(last, None)
    if is_parameter:
        place.register_parameter(last, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    else:
        place.register_buffer(last, tensor.clone())


def _submodule(module: torch.nn.Module, name: str) -> torch.nn.Module:
    for part in name.split(".") if name else ():
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    return module


def set_layer(module: fx.GraphModule, node: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a layer another weight, and another bias if one is given."""
    place = AFFINE_AT.get(node.target, 1)
    source = node.args[place]
    assert isinstance(source, fx.Node)
    put_tensor(module, str(source.target), weight)
    if bias is None:
        return
    given = node.args[place + 1] if len(node.args) > place + 1 else None
    if isinstance(given, fx.Node):
        put_tensor(module, str(given.target), bias)
        return
    name = f"{str(source.target).removesuffix('.weight')}.bias"
    put_tensor(module, name, bias)
    with module.graph.inserting_before(node):
        attribute = module.graph.get_attr(name)
    node.args = (*node.args[: place + 1], attribute, *node.args[place + 2 :])
