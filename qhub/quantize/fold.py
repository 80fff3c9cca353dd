"""Folding: an input scale moves into the module that produces the input, and the block computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from qhub.quantize.observe import LayerGroup, Producer, get_weight, is_matrix, is_transposed, set_weight
from qhub.skeleton import BlockCall, run_block

# Share of the block's output on the probe that a fold may move: weights in 16 bits are rounded again as they are scaled.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 0.02


@dataclass
class FoldedWeights:
    """The float weights of a block's `module`, and what folding made of them; the module always runs with the latter.

    `dtype` is the artifact's; `probe` is a short float32 input with its call, on which a fold must not change the output.
    """

    module: nn.Module
    dtype: torch.dtype
    probe: tuple[torch.Tensor, BlockCall] | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # layer → float32 weight with scales folded in
    changed: set[str] = field(default_factory=set)  # parameters that folding changed, by name inside the block

    def weight(self, name: str) -> torch.Tensor:
        """Weight (N, K) float32 of a layer that is not quantized yet."""
        if name in self.weights:
            return self.weights[name]
        return get_weight(self.module.get_submodule(name)).float()

    def fold(self, shape: LayerGroup, scale: torch.Tensor) -> torch.Tensor | None:
        """Divide the input of `shape` by `scale` (K,) in its producer; the scale really folded, or None and nothing changed.

        Where the producer is a norm, `scale` is first moved to the nearest one whose folded gain the stored dtype holds
        exactly, so that folding rounds nothing. Kept only if the block's output on the probe stays what it was.
        """
        producer = shape.producer
        if producer is None or not bool(torch.isfinite(scale).all()) or float(scale.min()) <= 0:
            return None
        undo, before = self._snapshot(shape, producer), self._probe_output()
        if is_matrix(self.module.get_submodule(producer.module)):
            self._divide_rows(producer, scale)
        else:
            scale = self._divide_norm(producer, scale)
        for name in shape.layers:
            self._replace(name, self.weight(name) * scale)
        if self._is_same(before, self._probe_output()):
            return scale
        undo()
        return None

    def current(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """What the artifact holds for tensor `name` (inside the block) that is not quantized: `stored` unless folding changed it."""
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.weights:
            weight = self.weights[layer]
            weight = weight.t() if is_transposed(self.module.get_submodule(layer)) else weight
            return weight.to(stored.dtype).contiguous()
        if name in self.changed:
            return self.module.get_parameter(name).detach().to(stored.dtype)
        return stored

    def _snapshot(self, shape: LayerGroup, producer: Producer) -> Callable[[], None]:
        names = {*shape.layers, producer.module}
        parameters = {name: dict(self.module.get_submodule(name)._parameters) for name in names}
        weights, changed = dict(self.weights), set(self.changed)

        def undo() -> None:
            for name, kept in parameters.items():
                self.module.get_submodule(name)._parameters.update(kept)
            self.weights, self.changed = weights, changed

        return undo

    def _probe_output(self) -> torch.Tensor | None:
        if self.probe is None:
            return None
        hidden, call = self.probe
        return run_block(self.module, hidden.to(self._forward_dtype()), call).float()

    def _forward_dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _is_same(self, before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
        if before is None or after is None:
            return True
        moved = float((after - before).norm() / before.norm().clamp_min(1e-12))
        return moved < (_TOLERANCE if self._forward_dtype() == torch.float32 else _TOLERANCE_16_BITS)

    def _divide_rows(self, producer: Producer, scale: torch.Tensor) -> None:
        weight = self.weight(producer.module)
        divisor = torch.ones(len(weight), device=weight.device)
        divisor[producer.rows.to(weight.device)] = scale.to(weight.device)
        self._replace(producer.module, weight / divisor.unsqueeze(1))
        self._divide_bias(producer.module, divisor)

    def _divide_norm(self, producer: Producer, scale: torch.Tensor) -> torch.Tensor:
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
        self.weights[name] = weight
        set_weight(self.module.get_submodule(name), weight)
