"""Does the artifact compute what the QuantizedModel says: the same codes, and the same logits as qhub's own reference."""

from __future__ import annotations

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

    from qhub.interfaces import Runtime


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


def compare_logits(quantized: Path, artifact: Path, runtime: Runtime, ids: NDArray[np.int64]) -> dict[str, Any]:
    """Open `artifact` in `runtime` and compare its logits on ids (B, T) with the reference; compare codes where they can be read."""
    exact = runtime.rounds_activations  # it computes in float32 then, and so does the reference
    expected = reference_logits(quantized, torch.from_numpy(ids), torch.float32 if exact else None)
    session = runtime.open(artifact, OpenOptions(exact=exact))
    try:
        found = torch.from_numpy(session.logits(ids))
    finally:
        session.close()
    opened = f"opened with `{runtime.name}`{' (exact path)' if exact else ''}"
    return {
        "checked": True,
        "max_abs_diff": float((found - expected).abs().max()),
        "codes_identical": codes_identical(quantized, artifact),
        "how": f"{opened}; logits of {ids.size} tokens against qhub's reference; codes read back from the file",
    }


def compare_codes(quantized: Path, artifact: Path, why: str) -> dict[str, Any]:
    """What can be said of an artifact that nothing here opens (`why`): whether its codes, read back, are the QuantizedModel's."""
    identical = codes_identical(quantized, artifact)
    read = "" if identical is None else f"; codes, scales and zeros read back from the file: {'the same' if identical else 'DIFFERENT'}"
    return {"checked": False, "codes_identical": identical, "how": f"{why}{read}"}


def codes_identical(quantized: Path, artifact: Path) -> bool | None:
    """Whether all codes, scales and zeros in the artifact equal the QuantizedModel's; None for formats that are read elsewhere."""
    if not (artifact / "config.json").exists():
        return None
    ours = open_packed(quantized)
    try:
        theirs = open_packed(artifact)
    except DamagedModelError:
        return False
    except QhubError:
        return None
    return ours.layers.keys() == theirs.layers.keys() and all(_same_layer(ours, theirs, name) for name in ours.layers)


def _same_layer(ours: PackedWeights, theirs: PackedWeights, name: str) -> bool:
    return ours.layers[name].scheme == theirs.layers[name].scheme and ours.layer(name).equals(theirs.layer(name))
