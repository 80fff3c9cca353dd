"""Is the artifact of a network the QuantizedModel: the same codes in the file, and the same outputs from the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qhub.errors import QhubError
from qhub.graph.store import QuantizedGraph
from qhub.graph.values import Batch
from qhub.plugins import missing_modules
from qhub.types import OpenOptions

if TYPE_CHECKING:
    from qhub.interfaces import Exporter, Runtime
    from qhub.quantize.qtensor import QTensor


def check_artifact(
    quantized: QuantizedGraph, artifact: Path, exporter: Exporter, runtime: Runtime | None, batches: Sequence[Batch]
) -> dict[str, Any]:
    """What the report says of an artifact: codes read back, and outputs on `batches` where something here opens it.

    :raises QhubError: when the codes differ, naming the first layer.
    """
    identical = _compare_codes(quantized, artifact, exporter)
    codes = "" if identical is None else "; codes, scales and zeros read back from the file: the same"
    lacking = "a runtime for this format" if runtime is None else ", ".join(missing_modules(runtime))
    if runtime is None or lacking:
        return {"checked": False, "codes_identical": identical, "how": f"{lacking} is not installed here{codes}"}
    found = _outputs(runtime, artifact, batches)
    expected = _reference(quantized, batches)
    differences = [float(np.abs(one - other).max()) for one, other in zip(expected, found, strict=True)]
    agreed = np.concatenate([(one.argmax(-1) == other.argmax(-1)).reshape(-1) for one, other in zip(expected, found, strict=True)])
    span = max(float(one.max() - one.min()) for one in expected)
    count = sum(len(one) for one in expected)
    opened = f"opened with `{runtime.name}`{' (exact path)' if runtime.rounds_activations else ''}"
    far = f"largest difference {max(differences):.2g} of a span of {span:.3g}, same first answer {100 * float(agreed.mean()):.1f} %"
    how = f"{opened}; {count} items: {far}{codes}"
    return {
        "checked": True,
        "max_abs_diff": max(differences),
        "codes_identical": identical,
        "how": how,
        "top1_agreement": float(agreed.mean()),
    }


def _compare_codes(quantized: QuantizedGraph, artifact: Path, exporter: Exporter) -> bool | None:
    theirs = exporter.read_layers(artifact)
    if theirs is None:
        return None
    wrong = first_difference(quantized.layers(), theirs)
    if wrong is not None:
        message = f"`{artifact}` does not hold the codes of the quantized model: layer `{wrong}` differs"
        raise QhubError(message, hint=f"this is an error of `{exporter.name}`: please report it")
    return True


def first_difference(ours: Mapping[str, QTensor], theirs: Mapping[str, QTensor]) -> str | None:
    """The first layer that is missing or has other codes, scales or zeros."""
    for layer, tensor in ours.items():
        other = theirs.get(layer)
        if other is None or tensor.bits != other.bits:
            return layer
        pairs = ((tensor.codes, other.codes), (tensor.scale, other.scale), (tensor.zero, other.zero))
        if not all(one.shape == two.shape and bool((one == two).all()) for one, two in pairs):
            return layer
    return None


def _outputs(runtime: Runtime, artifact: Path, batches: Sequence[Batch]) -> list[Any]:
    session = runtime.open_graph(artifact, OpenOptions(exact=runtime.rounds_activations))
    try:
        return [np.asarray(session.run(batch)[0]) for batch in batches]
    finally:
        session.close()


def _reference(quantized: QuantizedGraph, batches: Sequence[Batch]) -> list[Any]:
    graph = quantized.graph()
    return [graph.run(batch)[0].numpy() for batch in batches]
