"""A whole model at once: lets a `WholeModel` method work, then writes what it made as the QuantizedModel's shards.

What the method leaves is kept in the work directory until the last shard is written, so that an interrupted run does not
let it work twice. Codes and zeros are the method's own; so are its scales, if 16 bits hold them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qhub.errors import PluginError, Unsupported
from qhub.events import Events, Progress
from qhub.interfaces import ModelJob, WholeModel, WholeResult
from qhub.quantize.observe import each_matrix
from qhub.quantize.qtensor import LARGEST_SCALE, QTensor
from qhub.quantize.store import has_plain_zeros, layer_tensors, shard_name, write_shard
from qhub.quantize.walk import WalkPlan, WalkResult, refuse_undividable
from qhub.skeleton import FloatWeights, Skeleton, is_finite
from qhub.types import Scheme

RESULT = "whole"  # in the work directory: what the method left


def quantize_whole(plan: WalkPlan, quantizer: WholeModel, events: Events) -> WalkResult:
    """Quantize with a method that takes the whole model.

    :raises Unsupported: when the architecture holds matrices that qhub cannot take, or a group size does not divide a layer.
    :raises PluginError: when what the method made is not what it was asked for.
    """
    return _Whole(plan, quantizer, events).run()


class _Whole:
    def __init__(self, plan: WalkPlan, quantizer: WholeModel, events: Events) -> None:
        self.plan = plan
        self.quantizer = quantizer
        self.events = events
        self.skeleton = Skeleton(FloatWeights(plan.source), trust_remote_code=plan.trust_remote_code)
        self.schemes, self.ignored = layers_of(self.skeleton, plan)
        self.result = WalkResult(schemes=dict(self.schemes), ignored=list(self.ignored))

    def run(self) -> WalkResult:
        done = self.plan.work / RESULT
        if not done.exists():
            self._let_it_work(done)
        found = self.quantizer.read_result(done)
        self._check_names(found)
        count = len(self.skeleton.block_names)
        progress = Progress(self.events, "quantize", count)
        outer = [(name, name) for name in self.skeleton.outer_tensors()]
        self._write(shard_name(0, count + 1), outer, found)
        self.result.ignored += [name for name, module in self._outer_linears() if name not in self.result.ignored]
        for index, prefix in enumerate(self.skeleton.block_names):
            named = [(stored, f"{prefix}.{self.skeleton.inside(stored, index)}") for stored in self.skeleton.tensors_of(index)]
            self._write(shard_name(index + 1, count + 1), named, found)
            progress.block(index, prefix)
        return self.result

    def _outer_linears(self) -> list[tuple[str, nn.Module]]:
        linears = [(name, one) for name, one in self.skeleton.model.named_modules() if isinstance(one, nn.Linear)]
        return [(name, one) for name, one in linears if not name.startswith(f"{self.skeleton.blocks_name}.")]

    def _let_it_work(self, done: Path) -> None:
        growing = done.with_suffix(".growing")
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        self.events.note(f"`{self.quantizer.name}` works on the whole model at once")
        job = ModelJob(self.plan.source, growing, self.plan.ids, self.schemes, tuple(self.ignored), self.plan.device)
        self.quantizer.quantize_model(job)
        growing.rename(done)

    def _check_names(self, found: WholeResult) -> None:
        """Refuse what the files of the float model have no place for: it would be lost."""
        known = {*self.skeleton.files, *(name for name, _ in self.skeleton.model.named_parameters()), "lm_head.weight"}
        extra = [name for name in found.tensor_names() if name not in known]
        if extra:
            message = f"`{self.quantizer.name}` made the tensor `{extra[0]}`, which the float model does not have"
            raise PluginError(message, hint="such a result cannot be stored: use another method or other options")

    def _write(self, file: str, named: Sequence[tuple[str, str]], found: WholeResult) -> None:
        """One shard: `named` is each tensor's name in the float files, and in the model."""
        dtype = self.skeleton.model_dtype
        plain_zeros = has_plain_zeros(self.schemes.values())
        made = set(found.tensor_names())
        tensors: dict[str, torch.Tensor] = {}
        for stored, full in named:
            layer = full.removesuffix(".weight")
            if layer in self.schemes and full.endswith(".weight"):
                tensors |= layer_tensors(layer, self._layer(layer, found), dtype, plain_zeros=plain_zeros)
            else:
                tensors[full] = self._float(stored, next((name for name in self._also_called(stored, full) if name in made), None), found)
        write_shard(self.plan.out / file, tensors)

    def _also_called(self, stored: str, full: str) -> tuple[str, ...]:
        base = f"{self.skeleton.model.base_model_prefix}."
        return full, stored, f"{base}{stored}", stored.removeprefix(base)

    def _float(self, stored: str, made: str | None, found: WholeResult) -> torch.Tensor:
        original = self.skeleton.files.read(stored)
        if made is None:
            return original
        tensor = found.tensor(made)
        if tensor.shape != original.shape or (tensor.is_floating_point() and not is_finite(tensor)):
            shapes = f"{list(original.shape)} was wanted, {list(tensor.shape)} made, or its numbers are not finite"
            message = f"`{self.quantizer.name}` damaged the tensor `{made}`: {shapes}"
            raise PluginError(message, hint="use another method or more calibration data")
        return tensor.to(original.dtype)

    def _layer(self, name: str, found: WholeResult) -> QTensor:
        given, scheme = found.layer(name), self.schemes[name]
        wanted = (scheme.weight_bits, scheme.symmetric, scheme.group_size or given.codes.shape[1])
        if (given.bits, given.symmetric, given.group_size) != wanted or int(given.codes.max()) >= 1 << given.bits:
            message = f"`{self.quantizer.name}` did not quantize `{name}` to `{scheme}`"
            raise PluginError(message, hint="use another method or scheme")
        tensor, notes = fit_store(given, self.skeleton.model_dtype)
        if not bool((tensor.scale > 0).all()) or not is_finite(tensor.scale):
            message = f"`{self.quantizer.name}` gave layer `{name}` a scale that is not a positive number"
            raise PluginError(message, hint="use another method or more calibration data")
        if notes:
            self.result.notes[name] = "; ".join(notes)
        return tensor


def layers_of(skeleton: Skeleton, plan: WalkPlan) -> tuple[dict[str, Scheme], list[str]]:
    """The scheme of each layer to quantize, and the linear layers of the blocks that stay float, by full name.

    :raises Unsupported: for layers of another kind, and where a group size does not divide.
    """
    schemes: dict[str, Scheme] = {}
    ignored, bad = [], []
    for index, prefix in enumerate(skeleton.block_names):
        block = skeleton.empty_block(index)
        for inside, inputs in ((name, shape.inputs) for shape in each_matrix(block) for name in shape.layers):
            name, kind = f"{prefix}.{inside}", type(block.get_submodule(inside))
            scheme = plan.choice.of(name)
            if scheme is None:
                ignored.append(name)
                continue
            if kind is not nn.Linear:
                message = f"`{plan.quantizer.name}` takes plain linear layers; `{name}` is a `{kind.__name__}`"
                raise Unsupported(message, hint="use a method that works block by block, e.g. `--plugin gptq`")
            schemes[name] = scheme
            if inputs % (scheme.group_size or inputs):
                bad.append((name, inputs, scheme))
    refuse_undividable(bad)
    skeleton.check_blocks()
    return schemes, ignored


def fit_store(tensor: QTensor, dtype: torch.dtype) -> tuple[QTensor, list[str]]:
    """The same tensor with scales that the store's other layouts hold exactly, and zeros ≥ 1 where that changes nothing.

    A scale goes to the nearest number that fp16 and `dtype` both hold. A group whose zero is 0 has codes and zero raised by
    one, unless its largest code is in use: then it stays, and a format that stores zero − 1 has to refuse it. The notes say
    what was done.
    """
    notes = []
    scale = tensor.scale.clamp(2.0**-24, LARGEST_SCALE.get(dtype, 65504.0)).to(dtype if dtype == torch.bfloat16 else torch.float16)
    scale = scale.to(torch.float16).float()
    moved = scale != tensor.scale
    if bool(moved.any()):
        far = ((scale - tensor.scale).abs() / tensor.scale)[moved].max()
        notes.append(f"{int(moved.sum())} of {moved.numel()} scales rounded to 16 bits, by at most {float(far):.1e} of their value")
    codes, zero = raise_zeros(tensor)
    if bool((zero < 1).any()):
        notes.append(f"{int((zero < 1).sum())} of {zero.numel()} zeros are 0")
    return QTensor(codes, scale, zero, tensor.bits, tensor.symmetric), notes


def raise_zeros(tensor: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and zeros of the same weights, each zero of 0 raised to 1 where the group's codes leave room."""
    rows, groups = tensor.zero.shape
    codes = tensor.codes.reshape(rows, groups, -1)
    up = (tensor.zero == 0) & (codes.amax(dim=-1) < (1 << tensor.bits) - 1)
    if not bool(up.any()):
        return tensor.codes, tensor.zero
    return (codes + up.unsqueeze(-1).to(torch.uint8)).reshape(tensor.codes.shape), tensor.zero + up
