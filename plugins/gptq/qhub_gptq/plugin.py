"""The `gptq` quantizer: second-order rounding of each layer on the inputs that the quantized model will really see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qhub import Block, Group, Quantizer, Scheme, hookimpl

if TYPE_CHECKING:
    import torch

    from qhub import QTensor
    from qhub_gptq.solver import Hessian


class Gptq(Quantizer):
    """GPTQ with activation order on static groups, searched ranges and compensation of the quantized prefix.

    Options: `damping` (share of the mean of the Hessian's diagonal added to it), `compensate` (correct for how the blocks
    and layers before moved this layer's input), `refits` (how often scales are fitted to the codes and the layer solved
    again; auto: twice below 4 bits, else not at all, as it gains little there).
    """

    name = "gptq"
    summary = "second-order error feedback, layer by layer"
    distribution = "qhub-gptq"
    requires = ("torch",)
    needs = frozenset({"gram", "shortfall"})
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
        quantized = self._solve_tall(_tall(list(weights.values())), list(weights), scheme, group, block)
        parts = torch.arange(len(quantized.codes)).split([len(weight) for weight in weights.values()])
        return {name: quantized.rows(int(part[0]), int(part[-1]) + 1) for name, part in zip(weights, parts, strict=True)}

    def _solve_tall(self, weight: torch.Tensor, names: Sequence[str], scheme: Scheme, group: Group, block: Block) -> QTensor:
        import torch

        from qhub import QTensor, fit_scales, pick_rows, quantize_rtn, search_grid
        from qhub_gptq.solver import Hessian, round_with_feedback

        gram = group.stats.gram
        if gram is None:
            block.note(group, "rounded to nearest: no calibration statistics")
            return quantize_rtn(weight, scheme, block.dtype)
        hessian = Hessian.of(gram, float(self.settings["damping"]))
        if hessian is None:
            block.note(group, "rounded to nearest: the Hessian does not factorise")
            return quantize_rtn(weight, scheme, block.dtype)
        weight = self._compensated(weight, names, group, hessian)
        grid = search_grid(weight, scheme, block.dtype, gram.diagonal())
        best, least = None, None
        for _ in range(1 + self._refits(scheme)):
            grid = grid if best is None else fit_scales(weight, best, gram, block.dtype)
            codes, loss = round_with_feedback(weight, grid, hessian, scheme.weight_bits)
            found = QTensor(codes, grid.scale, grid.zero, scheme.weight_bits, scheme.symmetric)
            best = found if best is None else pick_rows(best, found, loss < least)
            least = loss if least is None else torch.minimum(least, loss)
        assert best is not None
        return best

    def _compensated(self, weight: torch.Tensor, names: Sequence[str], group: Group, hessian: Hessian) -> torch.Tensor:
        """The weight to round: the float model's, corrected where the layers have a shortfall to make up for."""
        if not self.settings["compensate"]:
            return weight
        shortfalls = [missing for name in names if (missing := group.shortfall(name)) is not None]
        return hessian.compensate(weight, _tall(shortfalls)) if shortfalls else weight

    def _refits(self, scheme: Scheme) -> int:
        chosen = self.settings["refits"]
        return (2 if scheme.weight_bits < 4 else 0) if chosen == "auto" else int(chosen)


def _tall(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices of one width on top of each other; a single one is not copied."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `gptq`."""
    return [Gptq()]
