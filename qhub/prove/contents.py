"""What a QuantizedModel holds, for the report: bits per weight, bytes by class, and what was said of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qhub.graph.store import QuantizedGraph, is_graph
from qhub.quantize.store import QuantizedWeights
from qhub.weights import WeightFiles


@dataclass(frozen=True)
class Contents:
    """`bytes` of all files that hold numbers; `bits_per_weight` of quantized ones, scales and zeros included."""

    bytes: int
    bits_per_weight: float
    bytes_by_class: Mapping[str, int]
    notes: Mapping[str, str]


def contents(folder: Path) -> Contents:
    """The contents of a QuantizedModel of either kind."""
    if is_graph(folder):
        return _of_graph(QuantizedGraph.open(folder))
    weights = QuantizedWeights(folder)
    return Contents(file_bytes(folder), bits_per_weight(weights), weights.bytes_by_class(), weights.metadata["notes"])


def file_bytes(path: Path) -> int:
    """Bytes of a model: of its file, or of the files of its folder that hold numbers."""
    if path.is_file():
        return path.stat().st_size
    if is_graph(path):
        return QuantizedGraph.open(path).program.stat().st_size
    return sum(file.stat().st_size for file in WeightFiles.open(path).files())


def bits_per_weight(weights: QuantizedWeights) -> float:
    """Stored bits per quantized weight, scales and zeros included."""
    sizes = weights.bytes_by_class()
    count = sum(weights.files[f"{name}.weight_packed"].bytes * 8 // scheme.weight_bits for name, scheme in weights.schemes.items())
    return 8 * (sizes["codes"] + sizes["scales_and_zeros"]) / max(count, 1)


def _of_graph(model: QuantizedGraph) -> Contents:
    sizes = model.metadata["sizes"]
    total = model.program.stat().st_size
    known = {name: int(sizes[name]) for name in ("codes", "scales_and_zeros", "sixteen_bit")}
    bits = 8 * (known["codes"] + known["scales_and_zeros"]) / sizes["weights"] if sizes["weights"] else 16.0
    classes = {name: count for name, count in known.items() if count}
    return Contents(total, bits, {**classes, "rest_of_the_file": max(total - sum(classes.values()), 0)}, model.metadata["notes"])
