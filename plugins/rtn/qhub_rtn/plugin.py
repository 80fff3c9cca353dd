"""The `rtn` quantizer: round to nearest, without data; the baseline that every report compares with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qhub import Block, Quantizer, Scheme, UsageError, hookimpl

if TYPE_CHECKING:
    import torch

    from qhub import QTensor

RANGES = ("minmax", "mse")


class Rtn(Quantizer):
    """Round to nearest. Option `range`: `minmax` clips nothing; `mse` searches the range of least squared weight error."""

    name = "rtn"
    summary = "round to nearest, no data"
    distribution = "qhub-rtn"
    requires = ("torch",)
    options: ClassVar[Mapping[str, Any]] = {"range": "minmax"}

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - plain YAML values
        super().__init__(**options)
        if self.settings["range"] not in RANGES:
            raise UsageError(f"option `range` of `rtn` is `{self.settings['range']}`", hint=f"use one of: {', '.join(RANGES)}")

    def quantize_layer(self, weight: torch.Tensor, scheme: Scheme, block: Block) -> QTensor:
        """Round weight (N, K) on its grid."""
        import torch

        from qhub import on_grid, quantize_rtn, search_grid

        if self.settings["range"] == "minmax":
            return quantize_rtn(weight, scheme, block.dtype)
        even = torch.ones(weight.shape[1], device=weight.device)
        return on_grid(weight, search_grid(weight, scheme, block.dtype, even), scheme)


@hookimpl
def qhub_quantizers() -> Sequence[Quantizer]:
    """Offer `rtn`."""
    return [Rtn()]
