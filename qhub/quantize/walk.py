"""The walk: one decoder block at a time from the float files through a quantizer to the QuantizedModel's shards.

In memory are one block's weights, its statistics, and the hidden states of two streams: the float model's (what each
block should see) and the quantized model's (what it will see). A block is done when its note in the work directory is
written; an interrupted walk goes on after the last one, with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qhub.errors import QhubError, Unsupported
from qhub.events import Events, Progress, rss_bytes
from qhub.interfaces import Quantizer
from qhub.quantize.block import LayerChoice, LiveBlock
from qhub.quantize.observe import PROBE_TOKENS, LayerGroup, each_matrix, is_transposed, observe
from qhub.quantize.store import layer_tensors, shard_name, write_json, write_shard
from qhub.skeleton import BlockCall, FloatWeights, Skeleton, batch_size, forward_dtype, run_block
from qhub.spool import Spool
from qhub.types import Scheme


@dataclass(frozen=True)
class WalkPlan:
    """What to quantize and where to: `out` receives shards, `work` what is needed to resume."""

    source: Path
    out: Path
    work: Path
    quantizer: Quantizer
    choice: LayerChoice
    ids: torch.Tensor | None  # (samples, seq_len) int64 calibration tokens; None when the method needs none
    device: str = "cpu"
    hidden_limit_bytes: int = 2 << 30
    max_memory_bytes: int | None = None
    trust_remote_code: bool = False


@dataclass
class WalkResult:
    """What became of each layer (full names)."""

    schemes: dict[str, Scheme] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)  # relative squared output error after each block
    transposed: list[str] = field(default_factory=list)  # layers whose float files hold (K, N), as GPT-2's do

    def add(self, note: Mapping[str, Any]) -> None:
        """Count a block from its note."""
        self.schemes.update({name: Scheme.parse(text) for name, text in note["layers"].items()})
        self.ignored.extend(note["ignored"])
        self.notes.update(note["notes"])
        self.errors.append(note["error"])
        self.transposed.extend(note["transposed"])


def walk(plan: WalkPlan, events: Events) -> WalkResult:
    """Quantize every block that is not done yet.

    :raises Unsupported: when the architecture holds matrices that qhub cannot take, or a group size does not divide a layer.
    :raises QhubError: when weights are damaged or memory runs over the bound.
    """
    return _Walk(plan, events).run()


class _Walk:
    def __init__(self, plan: WalkPlan, events: Events) -> None:
        self.plan = plan
        self.events = events
        weights = FloatWeights(plan.source)
        dtype = weights.model_dtype()
        self.skeleton = Skeleton(weights, dtype=dtype, device=plan.device, trust_remote_code=plan.trust_remote_code)
        hidden_size = int(self.skeleton.config.get_text_config().hidden_size)
        if plan.ids is not None:
            self.skeleton.dtype = forward_dtype(dtype, hidden_size, plan.device)
        self.count = len(self.skeleton.block_names)
        self.shapes: dict[tuple[Any, ...], tuple[LayerGroup, ...]] = {}
        self.calls: list[BlockCall] = []
        self.probe: tuple[torch.Tensor, list[BlockCall]] | None = None
        self.streams: dict[str, Spool] = {}

    def run(self) -> WalkResult:
        self._check_layers()
        result = WalkResult()
        done = self._done_blocks(result)
        self._write_outer(result)
        if self.plan.ids is not None and done < self.count:
            self._start_streams(self.plan.ids, done)
        progress = Progress(self.events, "quantize", self.count)
        for index in range(done, self.count):
            note = self._one_block(index)
            result.add(note)
            progress.block(index, self.skeleton.block_names[index], error=note["error"])
            self._check_memory(index)
        for stream in self.streams.values():
            stream.close()
        return result

    def _check_layers(self) -> None:
        """Refuse before a weight is read: blocks with other matrices, and layers that the group size does not divide."""
        bad = []
        for index, prefix in enumerate(self.skeleton.block_names):
            for name, inputs in ((name, shape.inputs) for shape in each_matrix(self.skeleton.empty_block(index)) for name in shape.layers):
                scheme = self.plan.choice.of(f"{prefix}.{name}")
                if scheme is not None and inputs % (scheme.group_size or inputs):
                    bad.append((f"{prefix}.{name}", inputs, scheme))
        if bad:
            named = ", ".join(f"`{name}` ({inputs} inputs, {scheme})" for name, inputs, scheme in bad)
            message = f"the group size does not divide the inputs of {named}"
            hint = f"keep such layers in float: `--override '{bad[0][0].rpartition('.')[2]}=float'`, or choose a smaller group"
            raise Unsupported(message, hint=hint)

    def _done_blocks(self, result: WalkResult) -> int:
        for index in range(self.count):
            path = self.plan.work / f"block-{index:05d}.json"
            if not path.exists() or not (self.plan.out / shard_name(index + 1, self.count + 1)).exists():
                return index
            result.add(json.loads(path.read_text(encoding="utf-8")))
        return self.count

    def _write_outer(self, result: WalkResult) -> None:
        names = self.skeleton.outer_tensors()
        result.ignored.extend(_matrix_names(self.skeleton.model, self.skeleton.blocks_name))
        path = self.plan.out / shard_name(0, self.count + 1)
        if not path.exists():
            tensors = {name: self.skeleton.files.read(name) for name in names}
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise QhubError(f"tensor `{name}` contains NaN or infinite numbers", hint="the file is damaged: get it again")
            write_shard(path, tensors)

    def _start_streams(self, ids: torch.Tensor, done: int) -> None:
        """Both streams of hidden states as they enter block `done`."""
        self.skeleton.learn_output_form(ids)
        batch = batch_size(len(ids), ids.shape[1])
        hidden, self.calls = self.skeleton.embed(ids[:batch])
        probe_hidden, probe_calls = self.skeleton.embed(ids[:1, :PROBE_TOKENS])
        self.probe = probe_hidden.float(), probe_calls
        limit = self.plan.hidden_limit_bytes // 4
        self.streams = {name: Spool(self.plan.work / f"{name}.spool", limit) for name in ("float", "quantized")}
        if done:
            shapes = [hidden.shape] * (len(ids) // batch)
            for name, stream in self.streams.items():
                stream.load(self._stream_path(name, done), shapes, hidden.dtype)
            return
        for start in range(0, len(ids), batch):
            hidden, _ = self.skeleton.embed(ids[start : start + batch])
            for stream in self.streams.values():
                stream.append(hidden)

    def _stream_path(self, name: str, index: int) -> Path:
        return self.plan.work / f"{name}-{index:05d}.hidden"

    @torch.no_grad()
    def _one_block(self, index: int) -> dict[str, Any]:
        shapes = self._shapes(index)
        with self.skeleton.block(index) as module, ExitStack() as stack:
            float_inputs = self._run_float(module, index, shapes, stack)
            block = self._live_block(index, module, shapes, float_inputs)
            self.plan.quantizer.quantize_block(block)
            error = self._run_quantized(module, index) if self.streams else _weight_error(self.skeleton, block)
            return self._write_block(block, error)

    def _live_block(
        self, index: int, module: nn.Module, shapes: Sequence[LayerGroup], float_inputs: Mapping[tuple[str, ...], Spool]
    ) -> LiveBlock:
        probe = None if self.probe is None else (self.probe[0], self.probe[1][index])
        return LiveBlock(
            index=index,
            name=self.skeleton.block_names[index],
            dtype=self.skeleton.model_dtype,
            module=module,
            call=self.calls[index] if self.calls else BlockCall((), {}),
            shapes=shapes,
            choice=self.plan.choice,
            hidden=self.streams.get("quantized"),
            wanted=self.plan.quantizer.needs,
            float_inputs=float_inputs,
            probe=probe,
        )

    def _shapes(self, index: int) -> tuple[LayerGroup, ...]:
        """The block's layer groups; blocks of one form are observed once."""
        empty = self.skeleton.empty_block(index)
        form = (type(empty), *((name, tuple(parameter.shape)) for name, parameter in empty.named_parameters()))
        if form not in self.shapes:
            if self.probe is None:
                self.shapes[form] = each_matrix(empty)
            else:
                with self.skeleton.block(index, dtype=torch.float32) as exact:
                    self.shapes[form] = observe(exact, self.probe[0], _as_float32(self.probe[1][index]))
        return self.shapes[form]

    def _run_float(self, module: nn.Module, index: int, shapes: Sequence[LayerGroup], stack: ExitStack) -> dict[tuple[str, ...], Spool]:
        """Move the float stream through the block; keep what enters each group if the quantizer asks for drift."""
        stream = self.streams.get("float")
        if stream is None:
            return {}
        kept: dict[tuple[str, ...], Spool] = {}
        if "drift" in self.plan.quantizer.needs:
            limit = self.plan.hidden_limit_bytes // (2 * len(shapes))
            for number, shape in enumerate(shapes):
                spool = kept[shape.layers] = Spool(self.plan.work / f"inputs-{number}.spool", limit)
                stack.callback(spool.close)
        with ExitStack() as hooks:
            for shape in shapes:
                if shape.layers in kept:
                    layer, spool = module.get_submodule(shape.layers[0]), kept[shape.layers]
                    hook = layer.register_forward_pre_hook(lambda _m, args, spool=spool: spool.append(args[0].detach()))
                    hooks.callback(hook.remove)
            for batch in range(len(stream)):
                stream[batch] = run_block(module, stream[batch], self.calls[index])
        return kept

    def _run_quantized(self, module: nn.Module, index: int) -> float:
        """Move the quantized stream through the quantized block; returns how far it is from the float stream, squared, relative."""
        stream, reference = self.streams["quantized"], self.streams["float"]
        moved = total = 0.0
        for batch in range(len(stream)):
            hidden = run_block(module, stream[batch], self.calls[index])
            stream[batch] = hidden
            expected = reference[batch].float()
            moved += float((hidden.float() - expected).square().sum())
            total += float(expected.square().sum())
        return moved / max(total, 1e-30)

    def _write_block(self, block: LiveBlock, error: float) -> dict[str, Any]:
        """Write the block's shard, then the streams, then the note that says it is done."""
        index, prefix = block.index, block.name
        layers = {f"{prefix}.{name}": tensor for name, tensor in block.results.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name in self.skeleton.tensors_of(index):
            inside = self.skeleton.inside(name, index)
            layer = inside.removesuffix(".weight")
            if layer in block.results and inside.endswith(".weight"):
                tensors.update(layer_tensors(f"{prefix}.{layer}", block.results[layer], self.skeleton.model_dtype))
            else:
                tensors[f"{prefix}.{inside}"] = block.current(inside, self.skeleton.files.read(name))
        write_shard(self.plan.out / shard_name(index + 1, self.count + 1), tensors)
        for name, stream in self.streams.items():
            stream.save(self._stream_path(name, index + 1))
        note = {
            "layers": {name: str(self.plan.choice.of(name)) for name in layers},
            "ignored": [f"{prefix}.{name}" for shape in block.shapes for name in shape.layers if name not in block.results],
            "notes": {f"{prefix}.{name}": text for name, text in block.notes.items()},
            "error": error,
            "transposed": [f"{prefix}.{name}" for name in block.results if is_transposed(block.module.get_submodule(name))],
        }
        write_json(self.plan.work / f"block-{index:05d}.json", note)
        for name in self.streams:
            self._stream_path(name, index).unlink(missing_ok=True)
        return note

    def _check_memory(self, index: int) -> None:
        bound = self.plan.max_memory_bytes
        if bound is not None and rss_bytes() > bound:
            message = f"memory `{rss_bytes() / 1e9:.2f}` GB went over the bound of {bound / 1e9:.2f} GB after block {index + 1}"
            raise QhubError(message, hint="go on with `--resume` and a larger `--max-memory`, or with fewer `--samples`")


def _matrix_names(model: nn.Module, blocks_name: str) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not name.startswith(f"{blocks_name}.")]


def _as_float32(call: BlockCall) -> BlockCall:
    def convert(value: Any) -> Any:  # noqa: ANN401 - whatever a block is called with
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
        return tuple(convert(item) for item in value) if isinstance(value, tuple) else value

    return BlockCall(tuple(convert(value) for value in call.args), {name: convert(value) for name, value in call.kwargs.items()})


def _weight_error(skeleton: Skeleton, block: LiveBlock) -> float:
    """Relative squared error of the block's weights: what can be said without data."""
    moved = total = 0.0
    for name, tensor in block.results.items():
        weight = skeleton.files.read(skeleton.stored_name(f"{block.name}.{name}.weight")).float()
        weight = weight.t() if is_transposed(block.module.get_submodule(name)) else weight
        moved += float((tensor.dequantize() - weight).square().sum())
        total += float(weight.square().sum())
    return moved / max(total, 1e-30)


def clean(work: Path) -> None:
    """Remove what only an interrupted walk needs."""
    for pattern in ("*.hidden", "*.spool", "*.partial", "block-*.json"):
        for path in work.glob(pattern):
            os.unlink(path)
