"""The hidden states of the calibration tokens on their way through the blocks, in the float model and in the quantized one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from qhub.quantize.block import FloatSide, LiveBlock
from qhub.quantize.observe import LayerGroup
from qhub.skeleton import BlockCall, run_block
from qhub.spool import Spool

_NAMES = ("float", "quantized")
_SHARE = 16  # of the memory for hidden states that one place of `new_spool` may take; each stream may take four


class Streams:
    """Two streams, a batch per entry: `float` is what each block should see, `quantized` what it will see.

    All of them together keep `limit_bytes` in memory and the rest in files in `work`.
    """

    def __init__(self, work: Path, limit_bytes: int) -> None:
        self.work = work
        self.limit_bytes = limit_bytes
        self.float, self.quantized = (Spool(work / f"{name}.spool", 4 * limit_bytes // _SHARE) for name in _NAMES)

    def begin(self, batches: Iterable[torch.Tensor]) -> None:
        """Both start with what enters the first block, (B, T, H) each."""
        for hidden in batches:
            self.float.append(hidden)
            self.quantized.append(hidden)

    @staticmethod
    def are_saved(work: Path, index: int) -> bool:
        """Whether what enters block `index` is on disk."""
        return all(_path(work, name, index).exists() for name in _NAMES)

    def load(self, index: int, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        """Start with what was saved on its way into block `index`."""
        for name, stream in self._each():
            stream.load(_path(self.work, name, index), shapes, dtype)

    def save(self, index: int) -> None:
        """Save what enters block `index`."""
        for name, stream in self._each():
            stream.save(_path(self.work, name, index))

    def forget(self, index: int) -> None:
        """Remove what was saved for block `index`."""
        for name in _NAMES:
            _path(self.work, name, index).unlink(missing_ok=True)

    def new_spool(self, name: str) -> Spool:
        """A place for more tensors, one per batch."""
        return Spool(self.work / f"{name}.spool", self.limit_bytes // _SHARE)

    def run_float(self, module: nn.Module, call: BlockCall, shapes: Sequence[LayerGroup], stack: ExitStack) -> FloatSide:
        """Move the float stream through a block; what it shows of `shapes` is kept until `stack` unwinds."""
        side = FloatSide()
        with ExitStack() as hooks:
            for number, shape in enumerate(shapes):
                self._keep(side, shape, number, module, stack, hooks)
            for batch in range(len(self.float)):
                self.float[batch] = run_block(module, self.float[batch], call)
        return side

    def _keep(self, side: FloatSide, shape: LayerGroup, number: int, module: nn.Module, stack: ExitStack, hooks: ExitStack) -> None:
        """Keep the residual stream after a layer has added to it; or what enters a layer that does not.

        Of layers that share an input nothing is kept: they read the stream, whose losses those that add to it make up for.
        """
        if len(shape.layers) > 1:
            return
        if shape.addition is not None and shape.addition.after is None:
            side.sums[shape.layers] = self.float  # by then, what has left the block
            return
        spool = self.new_spool(f"side-{number}")
        stack.callback(spool.close)
        if shape.addition is None:
            side.inputs[shape.layers], reader = spool, shape.layers[0]
        else:
            side.sums[shape.layers], reader = spool, str(shape.addition.after)
        hook = module.get_submodule(reader).register_forward_pre_hook(lambda _module, args: spool.append(args[0].clone()))
        hooks.callback(hook.remove)

    def run_quantized(self, block: LiveBlock) -> float:
        """Move the quantized stream through a finished block; how far it is from the float stream, squared, relative."""
        moved = total = 0.0
        for batch, expected in enumerate(self.float):
            hidden = block.run(batch, self.quantized[batch])
            self.quantized[batch] = hidden
            moved += float((hidden.float() - expected.float()).square().sum())
            total += float(expected.float().square().sum())
        return moved / max(total, 1e-30)

    def close(self) -> None:
        """Give memory and disk back."""
        for _, stream in self._each():
            stream.close()

    def _each(self) -> Sequence[tuple[str, Spool]]:
        return tuple(zip(_NAMES, (self.float, self.quantized), strict=True))


def _path(work: Path, name: str, index: int) -> Path:
    return work / f"{name}-{index:05d}.hidden"
