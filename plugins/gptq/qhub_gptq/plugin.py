"""The `gptq` quantizer: second-order rounding of each layer on the inputs that the quantized model will really see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qhub import Block, Group, Quantizer, Scheme, hookimpl

if TYPE_CHECKING:
    import torch

    from qhub import QTensor


class Gptq(Quantizer):
    """GPTQ with activation order on static groups, searched ranges and compensation of the quantized prefix.

    Options: `damping` (share of the mean of the Hessian's diagonal added to it), `compensate` (correct for how the blocks
    and layers before moved this layer's input), `refits` (how often scales are fitted to the codes and the layer solved
    again; auto: once, twice below 4 bits).
    """

    name = "gptq"
    summary = "second-order error feedback, layer by layer"
    distribution = "qhub-gptq"
    requires = ("torch",)
    needs = frozenset({"gram", "drift"})
    options: ClassVar[Mapping[str, Any]] = {"damping": 0.03, "compensate": True, "refits": "auto"}

    def quantize_group(self, group: Group, block: Block) -> Mapping[str, QTensor]:
        """Layers that read one input share its Hessian: those of one scheme are solved as one tall matrix."""
        schemes = block.schemes(group)
        result: dict[str, QTensor] = {}
        for scheme in dict.fromkeys(schemes.values()):
            names = [name for name, chosen in schemes.items() if chosen == scheme]
            result.update(self._solve(group, names, scheme, block))
        return result

    def _solve(self, group: Group, names: Sequence[str], scheme: Scheme, block: Block) -> dict[str, QTensor]:
        import torch

        weights = {name: weight for name, weight in group.weights.items() if name in names}
        quantized = self._solve_tall(torch.cat(list(weights.values())), scheme, group, block)
        parts = torch.arange(len(quantized.codes)).split([len(weight) for weight in weights.values()])
        return {name: quantized.rows(int(part[0]), int(part[-1]) + 1) for name, part in zip(weights, parts, strict=True)}

    def _solve_tall(self, weight: torch.Tensor, scheme: Scheme, group: Group, block: Block) -> QTensor:
        from qhub import QTensor, better_rows, compensate, fit_scales, quantize_rtn, search_grid, upper_factor
        from qhub_gptq.solver import round_with_feedback

        gram, drift, damping = group.stats.gram, group.stats.drift, float(self.settings["damping"])
        if gram is None:
            block.note(group, "rounded to nearest: no calibration statistics")
            return quantize_rtn(weight, scheme, block.dtype)
        if drift is not None and self.settings["compensate"]:
            factor = upper_factor(gram, damping)
            weight = weight if factor is None else compensate(weight, drift, factor, group.stats.residual)
        grid = search_grid(weight, scheme, block.dtype, gram.diagonal())
        solved: QTensor | None = None
        refits = self.settings["refits"]
        for _ in range(1 + (int(scheme.weight_bits < 4) + 1 if refits == "auto" else int(refits))):
            if solved is not None:
                grid = fit_scales(weight, solved, gram, block.dtype)
            codes = round_with_feedback(weight, grid, gram, scheme.weight_bits, damping)
            if codes is None:
                block.note(group, "rounded to nearest: the Hessian does not factorise")
                return quantize_rtn(weight, scheme, block.dtype)
            again = QTensor(codes, grid.scale, grid.zero, scheme.weight_bits, scheme.symmetric)
            solved = again if solved is None else better_rows(weight, gram, solved, again)
        assert solved is not None
        return solved


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `gptq`."""
    return [Gptq()]
