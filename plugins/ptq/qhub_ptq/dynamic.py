"""Dynamic rounding: the weights of linear layers once, what they read row by row while they run."""

from __future__ import annotations

from collections.abc import Sequence

from qhub import Batch, GraphJob, GraphResult, Quantization
from qhub_ptq.options import Settings
from qhub_ptq.plan import layers_of
from qhub_ptq.weights import round_weight


def dynamic(job: GraphJob, settings: Settings, batches: Sequence[Batch]) -> GraphResult:
    """Round the linear layers of the graph; convolutions stay float, as engines round no convolution's input while it runs."""
    layers, schemes = layers_of(job)
    linear = {name: op for name, op in layers.items() if op.kind == "linear"}
    notes = {name: "stays float: dynamic rounding is for linear layers" for name in layers if name not in linear}
    weights = {name: round_weight(job.graph.weight(name), schemes[name].weight_bits, reduce_range=settings.reduce_range) for name in linear}
    return GraphResult(job.graph, Quantization(weights, dynamic=frozenset(linear)), notes)
