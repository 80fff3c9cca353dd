"""For a training loop of one's own: `prepare` a module, train it, `finish` or `save` it."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from qhub import Batch, GraphResult, LayerChoice, Recipe, Scheme, TorchGraph, UsageError, graph_facts, inputs_of, write_graph
from qhub_qat.options import DEFAULTS, Settings
from qhub_qat.plan import plan_of
from qhub_qat.plugin import SCHEMES
from qhub_qat.prepared import Prepared, started


def prepare(model: nn.Module, inputs: Batch, recipe: Recipe | str) -> Prepared:
    """A module that is called as `model` is, rounds as its quantized form will, and whose `parameters()` can be trained.

    inputs: name → array, axis 0 the items, in the order in which `forward` takes them; the first ranges are those of these items,
    some hundred of the training data. recipe: a scheme, or a recipe whose scheme, overrides and option `edges` count. `model` is
    not changed.

    :raises UsageError: for a scheme that is not trained here. :raises QhubError: when nothing is left to quantize.
    """
    choice = LayerChoice(Scheme.parse(recipe)) if isinstance(recipe, str) else LayerChoice.of_recipe(recipe)
    if str(choice.scheme) not in SCHEMES:
        raise UsageError(f"`qat` does not write scheme `{choice.scheme}`", hint=f"it writes {', '.join(SCHEMES)}")
    options = {} if isinstance(recipe, str) else recipe.options.get("qat", {})
    settings = Settings.of({**DEFAULTS, **options})
    graph = TorchGraph.of(copy.deepcopy(model), inputs_of(inputs), ("logits",))
    plan = plan_of(graph, choice.scheme, choice.of, edges=settings.edges == "int8")
    return started(graph, plan, [inputs])


def finish(prepared: Prepared) -> GraphResult:
    """The trained network and how it is rounded: `result.graph.rounded(result.quantization)` gives what `prepared` gives."""
    return prepared.result()


def save(prepared: Prepared, folder: Path) -> Path:
    """Write the QuantizedModel into a new `folder`, which `qhub convert`, `qhub inspect` and exporters take; returns it.

    :raises UsageError: when the folder is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"`{folder}` is not empty", hint="give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    result = prepared.result()
    facts = graph_facts(result, "qat", str(prepared.plan.scheme))
    write_graph(folder, result.graph.rounded(result.quantization), result.quantization, facts)
    return folder
