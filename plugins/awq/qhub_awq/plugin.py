"""The `awq` quantizer: scale salient input channels up before rounding, fold the inverse into the producer, search ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qhub import Block, Group, Quantizer, Scheme, hookimpl

if TYPE_CHECKING:
    import torch

    from qhub import QTensor


class Awq(Quantizer):
    """AWQ: per input-sharing group the scale of least output error, then a searched range per group of weights.

    Options: `steps` (exponents tried), `compensate` (correct for how the blocks and layers before moved this layer's input).
    """

    name = "awq"
    summary = "activation-aware scaling, searched ranges"
    distribution = "qhub-awq"
    requires = ("torch",)
    needs = frozenset({"gram", "drift"})
    scales = True
    options: ClassVar[Mapping[str, Any]] = {"steps": 10, "compensate": True, "refits": 2}

    def scale_group(self, group: Group, block: Block) -> torch.Tensor | None:
        """The input scale of least output error; None when none beats leaving the input alone."""
        from qhub_awq import search

        schemes, weights, gram = block.schemes(group), group.weights, group.stats.gram
        if gram is None or group.stats.tokens == 0:
            return None
        if len(weights) == 1:
            ((name, weight),) = weights.items()
            loss = search.single_layer_loss(weight, gram, schemes[name], block.dtype)
        else:

            def loss(scale: torch.Tensor) -> float:
                return group.output_error({n: search.rounded(w, scale, schemes[n], block.dtype) for n, w in weights.items()})

        magnitudes = group.stats.abs_mean, search.weight_magnitude(weights, schemes)
        tried = search.candidates(*magnitudes, int(self.settings["steps"]))
        return search.best_scale(loss, tried, group.tied, len(group.stats.abs_mean))

    def quantize_group(self, group: Group, block: Block) -> Mapping[str, QTensor]:
        """Round to nearest on searched ranges; a row keeps its plain range where that is better."""
        from qhub import compensate, upper_factor

        schemes, gram, drift = block.schemes(group), group.stats.gram, group.stats.drift
        factor = upper_factor(gram) if gram is not None and drift is not None and self.settings["compensate"] else None
        result = {}
        for name, weight in group.weights.items():
            target = weight if factor is None or drift is None else compensate(weight, drift, factor, group.stats.residual)
            result[name] = self._round(target, gram, schemes[name], block)
        return result

    def _round(self, weight: torch.Tensor, gram: torch.Tensor | None, scheme: Scheme, block: Block) -> QTensor:
        from qhub import better_rows, fit_scales, on_grid, quantize_rtn, search_grid

        plain = quantize_rtn(weight, scheme, block.dtype)
        if gram is None:
            return plain
        searched = on_grid(weight, search_grid(weight, scheme, block.dtype, gram.diagonal()), scheme)
        best = better_rows(weight, gram, plain, searched)
        for _ in range(int(self.settings["refits"])):
            best = better_rows(weight, gram, best, on_grid(weight, fit_scales(weight, best, gram, block.dtype), scheme))
        return best


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `awq`."""
    return [Awq()]
