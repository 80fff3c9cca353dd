"""The walk: one decoder block at a time from the float files through a quantizer to the QuantizedModel's shards.

In memory are one block's weights, its statistics, and the hidden states of two streams: the float model's (what each
block should see) and the quantized model's (what it will see). A block is done when its note in the work directory is
written; an interrupted walk goes on after the last one, with the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qhub.errors import DamagedModelError, QhubError, Unsupported
from qhub.events import Events, Progress, give_back_memory, rss_bytes
from qhub.interfaces import Quantizer
from qhub.quantize.block import FloatSide, LayerChoice, LiveBlock
from qhub.quantize.observe import PROBE_TOKENS, LayerGroup, each_matrix, get_weight, is_transposed, observe
from qhub.quantize.store import has_plain_zeros, layer_tensors, shard_name, write_json, write_shard
from qhub.quantize.streams import Streams
from qhub.skeleton import BlockCall, FloatWeights, Skeleton, batch_size, forward_dtype, is_finite
from qhub.types import Scheme
from qhub.weights import read_header

TOKENS_AT_ONCE = 4096  # in one forward pass
_ROWS_COMPARED = 256  # at a time: they stay in the cache


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
    hidden_limit_bytes: int = 512 << 20
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
    subclassed: list[str] = field(default_factory=list)  # layers of a class of their own, as Falcon's are

    def add(self, note: Mapping[str, Any]) -> None:
        """Count a block from its note."""
        self.schemes.update({name: Scheme.parse(text) for name, text in note["layers"].items()})
        self.ignored.extend(note["ignored"])
        self.notes.update(note["notes"])
        self.errors.append(note["error"])
        self.transposed.extend(note["transposed"])
        self.subclassed.extend(note["subclassed"])


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
        self.streams: Streams | None = None
        self.plain_zeros = False  # how zero points are stored, once the schemes are known

    def run(self) -> WalkResult:
        self._check_layers()
        result = WalkResult()
        done = self._done_blocks(result)
        self._write_outer(result)
        if self.plan.ids is not None and done < self.count:
            self.streams = self._start_streams(self.plan.ids, done)
        progress = Progress(self.events, "quantize", self.count)
        for index in range(done, self.count):
            note = self._one_block(index)
            give_back_memory()
            result.add(note)
            progress.block(index, self.skeleton.block_names[index], error=note["error"])
            self._check_memory(index)
        if self.streams is not None:
            self.streams.close()
        return result

    def _check_layers(self) -> None:
        """Refuse before a weight is read: blocks with other matrices, layers that the group size does not divide, odd mixtures."""
        bad, special, schemes = [], {}, set()
        for index, prefix in enumerate(self.skeleton.block_names):
            block = self.skeleton.empty_block(index)
            for name, inputs in ((name, shape.inputs) for shape in each_matrix(block) for name in shape.layers):
                scheme = self.plan.choice.of(f"{prefix}.{name}")
                if scheme is None:
                    continue
                schemes.add(scheme)
                if type(block.get_submodule(name)) is not nn.Linear:
                    special[f"{prefix}.{name}"] = type(block.get_submodule(name)).__name__
                if inputs % (scheme.group_size or inputs):
                    bad.append((f"{prefix}.{name}", inputs, scheme))
        refuse_undividable(bad)
        _refuse_mixture(special, schemes)
        self.skeleton.check_blocks()
        self.plain_zeros = has_plain_zeros(schemes)

    def _done_blocks(self, result: WalkResult) -> int:
        """How many blocks need not be done again: those with note and shard, as far back as the next one's hidden states are kept."""
        notes: list[dict[str, Any]] = []
        while len(notes) < self.count and (note := self._note(len(notes))) is not None:
            notes.append(note)
        if self.plan.ids is not None and len(notes) < self.count:
            while notes and not Streams.are_saved(self.plan.work, len(notes)):
                notes.pop()
        for note in notes:
            result.add(note)
        return len(notes)

    def _note(self, index: int) -> dict[str, Any] | None:
        """What was noted when block `index` was done; None when it was not, or what it left cannot be read."""
        try:
            read_header(self.plan.out / shard_name(index + 1, self.count + 1))
            note: dict[str, Any] = json.loads((self.plan.work / f"block-{index:05d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, QhubError):
            return None
        return note

    def _write_outer(self, result: WalkResult) -> None:
        names = self.skeleton.outer_tensors()
        result.ignored.extend(_matrix_names(self.skeleton.model, self.skeleton.blocks_name))
        path = self.plan.out / shard_name(0, self.count + 1)
        if not path.exists():
            tensors = {name: self.skeleton.files.read(name) for name in names}
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not is_finite(tensor):
                    message = f"tensor `{name}` contains NaN or infinite numbers"
                    raise DamagedModelError(message, hint="the file is damaged or the training diverged: get the weights again")
            write_shard(path, tensors)

    def _start_streams(self, ids: torch.Tensor, done: int) -> Streams:
        """Both streams of hidden states as they enter block `done`."""
        self.skeleton.learn_output_form(ids)
        batch = batch_size(len(ids), ids.shape[1], TOKENS_AT_ONCE)
        hidden, self.calls = self.skeleton.embed(ids[:batch])
        probe_hidden, probe_calls = self.skeleton.embed(ids[:1, :PROBE_TOKENS])
        self.probe = probe_hidden.float(), probe_calls
        streams = Streams(self.plan.work, self.plan.hidden_limit_bytes)
        if done:
            streams.load(done, [hidden.shape] * (len(ids) // batch), hidden.dtype)
        else:
            streams.begin(self.skeleton.embed(ids[start : start + batch])[0] for start in range(0, len(ids), batch))
        self.skeleton.drop_outer()
        return streams

    @torch.no_grad()
    def _one_block(self, index: int) -> dict[str, Any]:
        shapes = self._shapes(index)
        with self.skeleton.block(index) as module, ExitStack() as stack:
            side = FloatSide()
            if self.streams is not None:
                keep = "shortfall" in self.plan.quantizer.needs
                side = self.streams.run_float(module, self.calls[index], shapes if keep else (), stack)
            block = self._live_block(index, module, shapes, side)
            stack.callback(block.replay.end)
            self.plan.quantizer.quantize_block(block)
            error = _weight_error(block) if self.streams is None else self.streams.run_quantized(block)
            return self._write_block(block, error)

    def _live_block(self, index: int, module: nn.Module, shapes: Sequence[LayerGroup], side: FloatSide) -> LiveBlock:
        probe = None if self.probe is None else (self.probe[0], self.probe[1][index])
        return LiveBlock(
            index=index,
            name=self.skeleton.block_names[index],
            dtype=self.skeleton.model_dtype,
            module=module,
            call=self.calls[index] if self.calls else BlockCall((), {}),
            shapes=shapes,
            choice=self.plan.choice,
            hidden=None if self.streams is None else self.streams.quantized,
            wanted=self.plan.quantizer.needs,
            float_side=side,
            probe=probe,
            new_spool=None if self.streams is None else self.streams.new_spool,
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

    def _write_block(self, block: LiveBlock, error: float) -> dict[str, Any]:
        """Write the block's shard, then the streams, then the note that says it is done."""
        index, prefix = block.index, block.name
        layers = {f"{prefix}.{name}": tensor for name, tensor in block.results.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name in self.skeleton.tensors_of(index):
            inside = self.skeleton.inside(name, index)
            layer = inside.removesuffix(".weight")
            if layer in block.results and inside.endswith(".weight"):
                turned = is_transposed(block.module.get_submodule(layer))
                dtype, full = self.skeleton.model_dtype, f"{prefix}.{layer}"
                tensors.update(layer_tensors(full, block.results[layer], dtype, transposed=turned, plain_zeros=self.plain_zeros))
            else:
                tensors[f"{prefix}.{inside}"] = block.floats.current(inside, self.skeleton.files.read(name))
        write_shard(self.plan.out / shard_name(index + 1, self.count + 1), tensors)
        if self.streams is not None:
            self.streams.save(index + 1)
        modules = {f"{prefix}.{name}": block.module.get_submodule(name) for name in block.results}
        note = {
            "layers": {name: str(self.plan.choice.of(name)) for name in layers},
            "ignored": [f"{prefix}.{name}" for shape in block.shapes for name in shape.layers if name not in block.results],
            "notes": {f"{prefix}.{name}": text for name, text in block.notes.items()},
            "error": error,
            "transposed": [full for full, module in modules.items() if is_transposed(module)],
            "subclassed": [full for full, module in modules.items() if isinstance(module, nn.Linear) and type(module) is not nn.Linear],
        }
        write_json(self.plan.work / f"block-{index:05d}.json", note)
        if self.streams is not None:
            self.streams.forget(index)
        return note

    def _check_memory(self, index: int) -> None:
        bound = self.plan.max_memory_bytes
        if bound is not None and rss_bytes() > bound:
            message = f"memory `{rss_bytes() / 1e9:.2f}` GB went over the bound of {bound / 1e9:.2f} GB after block {index + 1}"
            raise QhubError(message, hint="go on with `--resume` and a larger `--max-memory`, or with fewer `--samples`")


def refuse_undividable(bad: Sequence[tuple[str, int, Scheme]]) -> None:
    """Refuse layers, each as (name, inputs, scheme), whose inputs their group size does not divide.

    :raises Unsupported: naming all of them, when there are any.
    """
    if bad:
        named = ", ".join(f"`{name}` ({inputs} inputs, {scheme})" for name, inputs, scheme in bad)
        message = f"the group size does not divide the inputs of {named}"
        hint = f"keep such layers in float: `--override '{bad[0][0].rpartition('.')[2]}=float'`, or choose a smaller group"
        raise Unsupported(message, hint=hint)


def _refuse_mixture(special: Mapping[str, str], schemes: set[Scheme]) -> None:
    """transformers expands all but plain nn.Linear layers as it loads them, and takes all of them for layers of one scheme."""
    if special and len(schemes) > 1:
        named = ", ".join(sorted(f"`{scheme}`" for scheme in schemes))
        name, kind = next(iter(special.items()))
        message = f"transformers loads `{kind}` layers such as `{name}` only where all layers have one scheme, not {named}"
        raise Unsupported(message, hint="leave out the overrides, or keep layers in float: `--override 'PATTERN=float'`")


def _matrix_names(model: nn.Module, blocks_name: str) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not name.startswith(f"{blocks_name}.")]


def _as_float32(call: BlockCall) -> BlockCall:
    def convert(value: Any) -> Any:  # noqa: ANN401 - whatever a block is called with
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
        return tuple(convert(item) for item in value) if isinstance(value, tuple) else value

    return BlockCall(tuple(convert(value) for value in call.args), {name: convert(value) for name, value in call.kwargs.items()})


def _weight_error(block: LiveBlock) -> float:
    """Relative squared error of the block's weights, which nothing has replaced: what can be said without data."""
    moved = total = 0.0
    for name, tensor in block.results.items():
        weight = get_weight(block.module.get_submodule(name))
        for start in range(0, len(weight), _ROWS_COMPARED):
            rows = weight[start : start + _ROWS_COMPARED].float()
            total += float(rows.square().sum())
            moved += float((rows - tensor.rows(start, start + len(rows)).dequantize()).square_().sum())
    return moved / max(total, 1e-30)


def clean(work: Path) -> None:
    """Remove what only an interrupted walk needs."""
    for pattern in ("*.hidden", "*.spool", "*.partial", "block-*.json"):
        for path in work.glob(pattern):
            os.unlink(path)
    for name in ("whole", "whole.growing"):  # what a method that takes the whole model left
        shutil.rmtree(work / name, ignore_errors=True)
