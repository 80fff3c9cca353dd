"""Does the artifact compute what the QuantizedModel says: the same codes, and the same logits as qhub's own reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qhub.errors import DamagedModelError, QhubError
from qhub.quantize.layouts.reader import PackedWeights, open_packed
from qhub.quantize.store import QuantizedWeights
from qhub.skeleton import Skeleton, run_block
from qhub.types import OpenOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qhub.interfaces import Exporter, Runtime
    from qhub.quantize.qtensor import QTensor

MOST_OFF = 0.02  # of the reference's size: what rounding in another order may change
READ_BACK = "; codes read back from the file"


@torch.no_grad()
def reference_logits(quantized: Path, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Logits (B, T, V) float32 of the float model's code on dequantized weights, computed in `dtype` (None: the model's own)."""
    skeleton = Skeleton(QuantizedWeights(quantized, dtype), dtype=dtype)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    for index in range(len(skeleton.block_names)):
        with skeleton.block(index) as module:
            hidden = run_block(module, hidden, calls[index])
    return skeleton.logits(ids, hidden)


@dataclass(frozen=True)
class Codes:
    """Whether codes, scales and zeros of an artifact are the QuantizedModel's: None if only a runtime can tell.

    `differing` is the first layer, in the order of the model, whose numbers are others.
    """

    identical: bool | None
    differing: str | None = None


def compare_logits(
    quantized: Path, artifact: Path, runtime: Runtime, ids: NDArray[np.int64], exporter: Exporter | None = None
) -> dict[str, Any]:
    """Open `artifact` in `runtime` and compare its logits on ids (B, T) with the reference; compare codes where they can be read.

    :raises DamagedModelError: when codes differ, naming the first layer, or logits by more than `MOST_OFF`.
    """
    exact = runtime.rounds_activations  # it computes in float32 then, and so does the reference
    expected = reference_logits(quantized, torch.from_numpy(ids), torch.float32 if exact else None)
    session = runtime.open(artifact, OpenOptions(exact=exact))
    try:
        found = torch.from_numpy(session.logits(ids))
    finally:
        session.close()
    codes = _refusing_others(artifact, read_codes(quantized, artifact, exporter))
    off = share_off(found, expected)
    if not off <= MOST_OFF:
        message = f"`{artifact}`: logits of `{runtime.name}` are {off:.2%} off qhub's reference; {MOST_OFF:.0%} is rounding"
        raise DamagedModelError(message, hint="report it to whoever wrote the exporter or the runtime")
    opened = f"opened with `{runtime.name}`{' (exact path)' if exact else ''}"
    return {
        "checked": True,
        "max_abs_diff": float((found - expected).abs().max()),
        "codes_identical": codes.identical,
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        "how": f"{opened}; logits of {ids.size} tokens against qhub's reference{'' if codes.identical is None else READ_BACK}",
    }


def compare_codes(quantized: Path, artifact: Path, why: str, exporter: Exporter | None = None) -> dict[str, Any]:
    """What can be said of an artifact that nothing here opens (`why`): whether its codes, read back, are the QuantizedModel's.

    :raises DamagedModelError: when they are not, naming the first layer.
    """
    codes = _refusing_others(artifact, read_codes(quantized, artifact, exporter))
    read = "" if codes.identical is None else "; codes, scales and zeros read back from the file: the same"
    return {"checked": False, "codes_identical": codes.identical, "how": f"{why}{read}"}


def share_off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared difference as a share of the expected numbers' root mean square."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))


def read_codes(quantized: Path, artifact: Path, exporter: Exporter | None = None) -> Codes:
    """Compare all codes, scales and zeros in the artifact with the QuantizedModel's, read by its exporter if that can."""
    layers = None if exporter is None else exporter.read_layers(artifact)
    return _compared_folder(quantized, artifact) if layers is None else _compared(QuantizedWeights(quantized), layers)


def _refusing_others(artifact: Path, codes: Codes) -> Codes:
    if codes.identical is False:
        where = f"first in layer `{codes.differing}`" if codes.differing else "and cannot be read"
        message = f"codes, scales and zeros in `{artifact}` are not those that were quantized, {where}"
        raise DamagedModelError(message, hint="export it again; if that does not help, report it to whoever wrote the exporter")
    return codes


def _compared(ours: QuantizedWeights, theirs: Mapping[str, QTensor]) -> Codes:
    names = [*ours.schemes, *(name for name in theirs if name not in ours.schemes)]
    odd = (name for name in names if name not in ours.schemes or name not in theirs or not theirs[name].equals(ours.layer(name)))
    differing = next(odd, None)
    return Codes(differing is None, differing)


def _compared_folder(quantized: Path, artifact: Path) -> Codes:
    """Of a folder in a layout that qhub reads; what is read elsewhere is unknown."""
    if not (artifact / "config.json").exists():
        return Codes(None)
    ours = open_packed(quantized)
    try:
        theirs = open_packed(artifact)
    except DamagedModelError:
        return Codes(False)
    except QhubError:
        return Codes(None)
    names = [*ours.layers, *(name for name in theirs.layers if name not in ours.layers)]
    differing = next((name for name in names if not _same_layer(ours, theirs, name)), None)
    return Codes(differing is None, differing)


def _same_layer(ours: PackedWeights, theirs: PackedWeights, name: str) -> bool:
    if name not in ours.layers or name not in theirs.layers:
        return False
    return ours.layers[name].scheme == theirs.layers[name].scheme and ours.layer(name).equals(theirs.layer(name))
