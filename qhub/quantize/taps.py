"""Watching a block run: what its layers read goes into statistics, and what is finished is replayed instead of run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qhub.quantize.calibrate import InputStatistics
from qhub.quantize.observe import Closing
from qhub.skeleton import Enough
from qhub.spool import Spool


@dataclass
class Tap:
    """Feeds one batch of what a layer reads into `stats`; with `float_sum`, also what it would have to put out."""

    stats: InputStatistics
    stops: bool  # whether the pass may end here
    float_inputs: torch.Tensor | None = None
    float_sum: torch.Tensor | None = None  # the float model's residual stream after this layer's output is added
    stream: torch.Tensor | None = None  # the quantized model's, before
    record: Callable[[torch.Tensor], None] | None = None

    def attach(self, stack: ExitStack, layer: nn.Module, reader: nn.Module | None) -> None:
        """Watch `layer` and `reader` (of the stream, unless `stream` is known) until `stack` unwinds."""
        stack.callback(layer.register_forward_pre_hook(self._enters).remove)
        if reader is not None:
            stack.callback(reader.register_forward_pre_hook(self._reads).remove)

    def _reads(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stream = args[0]

    def _enters(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.record is not None:
            self.record(args[0])
        self.stats.add(args[0], self.float_inputs, self._wanted(layer))
        if self.stops:
            raise Enough

    def _wanted(self, layer: nn.Module) -> torch.Tensor | None:
        """What `layer`'s product must give for the stream to be the float model's, (…, N) in the forward dtype."""
        if self.float_sum is None or self.stream is None:
            return None
        wanted = self.float_sum - self.stream.reshape(self.float_sum.shape)
        bias = getattr(layer, "bias", None)
        return wanted if bias is None else wanted.sub_(bias)


class Replay:
    """Children of a block whose layers are all finished: run from what their last layer read, kept from the pass before.

    `new_spool` makes a place for tensors under a name. Set `batch` before each pass through the block.
    """

    def __init__(self, module: nn.Module, new_spool: Callable[[str], Spool] | None) -> None:
        self.batch = 0
        self._module = module
        self._new_spool = new_spool
        self._inputs: dict[str, Spool] = {}  # by child
        self._active: set[str] = set()

    def recorder(self, closing: Closing | None) -> Callable[[torch.Tensor], None] | None:
        """What keeps the inputs of the layer that ends `closing`'s child, a batch per call; None when it cannot be replayed."""
        if closing is None or self._new_spool is None:
            return None
        spool = self._inputs.setdefault(closing.child, self._new_spool(f"replay-{closing.child}"))
        return spool.append

    def begin(self, closing: Closing | None, layer: str) -> None:
        """From now on the child gives what `layer` gives on the inputs that were kept."""
        if closing is None or closing.child not in self._inputs:
            return
        child, last, spool = self._module.get_submodule(closing.child), self._module.get_submodule(layer), self._inputs[closing.child]

        finished: set[int] = set()  # batches whose output has taken the place of the input

        def replayed(*_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401 - stands for any forward
            kept = spool[self.batch]
            if self.batch not in finished:
                output = last(kept)
                if output.shape == kept.shape:
                    spool[self.batch] = output.clone()  # the block may add to what it gets, in place
                    finished.add(self.batch)
            else:
                output = kept.clone()
            return (output, *[None] * (closing.outputs - 1)) if closing.outputs else output

        child.forward = replayed
        self._active.add(closing.child)

    def changed(self, layers: Iterable[str]) -> None:
        """Forget everything if one of `layers` lies in a child that is replayed: what was kept came from other weights."""
        if not self._active.isdisjoint(layer.partition(".")[0] for layer in layers):
            self.end()

    def end(self) -> None:
        """Let all children run by themselves again."""
        for name, spool in self._inputs.items():
            spool.close()
            self._module.get_submodule(name).__dict__.pop("forward", None)
        self._inputs.clear()
        self._active.clear()
