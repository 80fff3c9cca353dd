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

    Options: `steps` (exponents there are to try), `compensate` (correct for how the blocks and layers before moved this
    layer's input), `sweeps` (how often each group's range is searched again, given the errors of the other groups).
    """

    name = "awq"
    summary = "activation-aware scaling, searched ranges"
    distribution = "qhub-awq"
    requires = ("torch",)
    needs = frozenset({"gram", "shortfall"})
    scales = True
    options: ClassVar[Mapping[str, Any]] = {"steps": 10, "compensate": True, "sweeps": 3}

    def scale_group(self, group: Group, block: Block) -> torch.Tensor | None:
        """The input scale of least output error; None when none beats leaving the input alone."""
        from qhub_awq import search

        schemes, weights, gram, abs_mean = block.schemes(group), group.weights, group.stats.gram, group.stats.abs_mean
        if gram is None or abs_mean is None:
            return None
        if len(weights) == 1:
            ((name, weight),) = weights.items()
            loss = search.single_layer_loss(weight, gram, schemes[name], block.dtype)
        else:

            def loss(scale: torch.Tensor) -> float:
                return group.output_error({n: search.rounded(w, scale, schemes[n], block.dtype) for n, w in weights.items()})

        magnitude = search.weight_magnitude(weights, schemes)

        def at(power: float, duo: bool) -> torch.Tensor:
            return group.tied(search.candidate(abs_mean, magnitude, power, duo=duo))

        return search.best_scale(loss, at, int(self.settings["steps"]))

    def quantize_group(self, group: Group, block: Block) -> Mapping[str, QTensor]:
        """Round on ranges searched for the layer's output error; a row keeps its plain range where that is better."""
        schemes, gram = block.schemes(group), group.stats.gram
        return {
            name: self._round(self._compensated(name, weight, group), gram, schemes[name], block) for name, weight in group.weights.items()
        }

    def _compensated(self, name: str, weight: torch.Tensor, group: Group) -> torch.Tensor:
        """The weight to round: that of the float model, corrected where the layer has a shortfall to make up for."""
        from qhub import compensate, lower_factor

        gram, missing = group.stats.gram, group.shortfall(name) if self.settings["compensate"] else None
        if gram is None or missing is None:
            return weight
        factor = lower_factor(gram)
        return weight if factor is None else compensate(weight, missing, factor)

    def _round(self, weight: torch.Tensor, gram: torch.Tensor | None, scheme: Scheme, block: Block) -> QTensor:
        from dataclasses import replace

        from qhub import better_rows, fit_scales, on_grid, quantize_rtn, search_grid
        from qhub_awq.descent import descend

        plain = quantize_rtn(weight, scheme, block.dtype)
        if gram is None:
            return plain
        searched = on_grid(weight, search_grid(weight, scheme, block.dtype, gram.diagonal()), scheme)
        best = better_rows(weight, gram, plain, searched)
        best = descend(weight, best, gram, scheme, block.dtype, int(self.settings["sweeps"]))
        return better_rows(weight, gram, best, replace(best, scale=fit_scales(weight, best, gram, block.dtype).scale))


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `awq`."""
    return [Awq()]
