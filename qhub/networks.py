"""The stages of a run whose model is a network as a graph, not a stack of decoder blocks; the same files, other contents.

quantize: recipe.yaml → quantized/ · verify: artifact/ → work/parity.json · evaluate: quantized/ → work/evaluation.json. Each is called
by its namesake in `stage.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qhub.data.classes import fit_labels
from qhub.data.preprocess import check_shapes
from qhub.data.read import read_data
from qhub.errors import NoRouteError, QhubError, UsageError
from qhub.events import Events, Progress
from qhub.feeding import BATCH, Feed, feed, feed_model, vocabulary_of
from qhub.graph.sources import EMBEDDING, Source, open_graph
from qhub.graph.store import QuantizedGraph, artifact_format, copy_companions, graph_facts, write_graph
from qhub.graph.values import Batch, GraphInput, Quantization
from qhub.interfaces import Exporter, Graph, GraphJob, GraphQuantizer, GraphResult, GraphSession, Runtime
from qhub.plugins import Plugins, missing_modules
from qhub.prove.artifact import check_artifact
from qhub.prove.bench import measure_apart
from qhub.prove.bench_network import NetworkJob
from qhub.prove.network import Comparison, compare
from qhub.quantize.block import LayerChoice
from qhub.route.host import fast_cores
from qhub.route.recipe import digest
from qhub.route.registry import find_target
from qhub.rundir import RunDir
from qhub.types import OpenOptions, QuantizedModel, Recipe, Scheme

VERIFIED_ITEMS = 64
BENCH = "work/bench.json"


def float_graph(run: RunDir, recipe: Recipe, found: Feed) -> Graph:
    """The float network of a run; `found` is data that it takes."""
    return open_graph(source_of(recipe, trust_remote_code=run.settings.trust_remote_code), found.sample())


def source_of(recipe: Recipe, *, trust_remote_code: bool = False) -> Source:
    """Where the float network of a recipe is."""
    factory = recipe.model if recipe.model_path.endswith(".safetensors") else None
    return Source(Path(recipe.model_path), factory, trust_remote_code)


def quantize(run: RunDir, recipe: Recipe, plugins: Plugins, quantizer: GraphQuantizer, events: Events) -> None:
    """Let the method decide, and write the rounded network into the folder where the QuantizedModel grows."""
    if recipe.calibration is None:
        raise QhubError("the recipe names no calibration data", hint="give them with `--calib`")
    found = feed(recipe, recipe.calibration, seed=recipe.seed or None)
    result = quantizer.quantize_graph(_job(run, recipe, plugins, found, events))
    _check(result, recipe)
    rounded = result.graph.rounded(result.quantization)
    facts = {**graph_facts(result, recipe.method, recipe.scheme), "recipe_digest": digest(recipe)}
    write_graph(run.partial, rounded, result.quantization, facts)
    copy_companions(Path(recipe.model_path), run.partial)
    if recipe.preprocess is not None:
        (run.partial / "preprocess.json").write_text(json.dumps(recipe.preprocess, indent=1) + "\n", encoding="utf-8")


def _job(run: RunDir, recipe: Recipe, plugins: Plugins, found: Feed, events: Events) -> GraphJob:
    graph = float_graph(run, recipe, found)
    for data in (recipe.calibration, recipe.evaluation):
        _check_data(graph, feed(recipe, data).into(graph.inputs) if data is not None else found)
    found = found.into(graph.inputs)
    judge = _Judge(graph, found)
    return GraphJob(
        graph=graph,
        scheme=Scheme.parse(recipe.scheme),
        scheme_of=LayerChoice.of_recipe(recipe).of,
        calibration=found.batches,
        labels=found.labels if found.has_labels else None,
        drop_pct=judge.drop_pct,
        max_drop_pct=recipe.goals.max_drop_pct,
        work=run.work,
        note=events.note,
        progress=_Counter(events).tell,
        target=find_target(recipe.target, plugins),
        seed=recipe.seed,
    )


def _check_data(graph: Graph, found: Feed) -> None:
    """Refuse data that the network does not take, before any work.

    :raises QhubError: for inputs of another shape and labels that it has no class for; it names the item.
    """
    sample = found.sample()
    check_shapes(dict(sample), {item.name: tuple(size if size >= 0 else None for size in item.shape) for item in graph.inputs})
    if not _is_embedding(graph):
        fit_labels(found.dataset, graph.run(sample)[0].shape[-1])


class _Counter:
    """Progress of work whose length is known once it begins."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.progress: Progress | None = None

    def tell(self, done: int, count: int, what: str) -> None:
        """`done` of `count` are finished, the last of them `what`."""
        if self.progress is None or self.progress.count != count:
            self.progress = Progress(self.events, "quantize", count)
        self.progress.block(done - 1, what)


class _Judge:
    """How much a rounded network loses on the calibration data; the float network's outputs are kept."""

    def __init__(self, graph: Graph, found: Feed) -> None:
        self.graph, self.feed = graph, found
        self.expected: list[Any] | None = None

    def drop_pct(self, rounded: Graph) -> float:
        """Accuracy drop in percent of the float network's."""
        if self.expected is None:
            self.expected = [self.graph.run(batch)[0].numpy() for batch in self.feed.batches()]
        return _compared(self.expected, lambda batch: rounded.run(batch)[0].numpy(), self.graph, self.feed).drop_pct


def _is_embedding(graph: Graph) -> bool:
    return graph.outputs[0] == EMBEDDING


def _check(result: GraphResult, recipe: Recipe) -> None:
    """Refuse a result in which nothing is quantized."""
    made = result.quantization
    if not made.weights and not made.casts:
        raise QhubError(
            f"`{recipe.method}` left every layer of `{recipe.model}` in float",
            hint="allow a larger drop: `--max-drop PCT`, or use another method",
        )


def verify(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Open each artifact in its runtime, compare codes and outputs with the QuantizedModel's, and measure its speed.

    :raises QhubError: when the codes in an artifact are not the QuantizedModel's; it names the first such layer.
    """
    from qhub.stage import runtime_for

    quantized = QuantizedGraph.open(run.quantized)
    found = first_items(recipe).into(quantized.inputs)
    checks = {}
    for artifact in run.read("work/artifacts.json"):
        exporter, path = plugins.exporters[recipe.exporter or ""], run.path / artifact["path"]
        runtime = runtime_for(recipe, artifact["format"], plugins)
        checks[artifact["path"]] = check_artifact(quantized, path, exporter, runtime, list(found.batches()))
        if checks[artifact["path"]]["checked"]:
            run.write(BENCH, _bench(run, recipe, path, Pair(exporter, runtime), events))
    run.write("work/parity.json", checks)


@dataclass(frozen=True)
class Pair:
    """Who writes an artifact and who opens it."""

    exporter: Exporter
    runtime: Runtime


def _bench(run: RunDir, recipe: Recipe, artifact: Path, pair: Pair, events: Events) -> dict[str, Any] | None:
    """The artifact's speed beside the float network's in the same engine; what fails here fails no run."""
    found = first_items(recipe)
    floating = run.work / "float"
    shutil.rmtree(floating, ignore_errors=True)
    try:
        graph = float_graph(run, recipe, found)
        path = export_float(graph, recipe, pair.exporter, floating)
        job = NetworkJob(
            str(artifact),
            pair.runtime.name,
            OpenOptions(threads=fast_cores()),
            (1, BATCH),
            length=max((value.shape[1] for value in found.sample().values() if value.ndim == 2), default=1),
            rounds=3,
            vocabulary=vocabulary_of(Path(recipe.model_path)),
            float_path=str(path),
        )
        return measure_apart(job, events)
    except QhubError as error:
        events.warning(f"speed was not measured: {error.message}")
        return None


def export_float(graph: Graph, recipe: Recipe, exporter: Exporter, folder: Path) -> Path:
    """The float network in the exporter's format, to compare with; returns where it is, below `folder`."""
    model, out = folder / "quantized", folder / exporter.format
    model.mkdir(parents=True)
    out.mkdir()
    facts = {"method": "float", "scheme": "float", "recipe_digest": "", "layers": {}, "float_layers": [], "notes": {}, "sizes": {}}
    write_graph(model, graph, Quantization(), facts)
    copy_companions(Path(recipe.model_path), model)
    exporter.export(QuantizedModel(model, "graph", "float", "float"), out, recipe)
    return out


def evaluate(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Measure the float and the quantized network on the same items, and each artifact in its engine."""
    if recipe.evaluation is None:
        raise QhubError("the recipe names no evaluation data", hint="give them with `--eval`")
    found = feed(recipe, recipe.evaluation)
    _warn_of_ranges(recipe, found, events)
    graph, quantized = float_graph(run, recipe, found), QuantizedGraph.open(run.quantized).graph()
    found = found.into(graph.inputs)
    expected = [graph.run(batch)[0].numpy() for batch in found.batches()]
    made = _compared(expected, lambda batch: quantized.run(batch)[0].numpy(), graph, found)
    artifacts = {path: made.figures.accuracy for path, made in _in_engines(run, recipe, plugins, expected, graph, found)}
    figures = {"float": _figures(made, quantized=False), "quantized": _figures(made, quantized=True)}
    run.write("work/evaluation.json", {"metric": made.metric, "items": found.dataset.count, **figures, "artifacts": artifacts})


def _compared(expected: Sequence[Any], run: Callable[[Batch], Any], graph: Graph, found: Feed) -> Comparison:
    pairs = zip(expected, (run(batch) for batch in found.batches()), strict=True)
    return compare(pairs, found.labels() if found.has_labels else None, embedding=_is_embedding(graph))


def _first(session: GraphSession, batch: Batch) -> Any:  # noqa: ANN401 - an array
    return session.run(batch)[0]


def _in_engines(
    run: RunDir, recipe: Recipe, plugins: Plugins, expected: Sequence[Any], graph: Graph, found: Feed
) -> Iterator[tuple[str, Comparison]]:
    """Each artifact that something here opens, measured there on all items."""
    from qhub.stage import runtime_for

    parity = run.read("work/parity.json")
    for artifact in run.read("work/artifacts.json"):
        path = artifact["path"]
        if not parity[path]["checked"]:
            continue
        session = runtime_for(recipe, artifact["format"], plugins).open_graph(run.path / path)
        try:
            yield path, _compared(expected, partial(_first, session), graph, found)
        finally:
            session.close()


def evaluate_folder(folder: Path, recipe: Recipe | None, data: str | None, plugins: Plugins) -> dict[str, Any]:
    """Figures of a quantized network by qhub's reference, or of an artifact by an engine that opens it; the float network beside it.

    :raises UsageError: when neither `data` nor the run says what to measure on. :raises NoRouteError: when nothing opens the artifact.
    """
    used = data or (recipe.evaluation.data if recipe is not None and recipe.evaluation is not None else None)
    if used is None:
        raise UsageError(f"`{folder}` brings no evaluation data", hint="give them: `--data DATA` (docs/data.md)")
    found = feed_model(folder, None, read_data(used))
    run, inputs, close = _opened(folder, plugins)
    found = found.into(inputs)
    try:
        outputs = [run(batch) for batch in found.batches()]
    finally:
        close()
    floating = _float_outputs(recipe, found)
    made = compare(zip(floating or outputs, outputs, strict=True), found.labels() if found.has_labels else None, embedding=_is_unit(folder))
    facts = {"model": str(folder), "data": used, "items": found.dataset.count, "metric": made.metric}
    if floating is None:
        return {**facts, "accuracy": made.figures.accuracy if made.metric == "accuracy" else None}
    return {**facts, **_figures(made, quantized=True), "drop_pct": made.drop_pct, "float": {"accuracy": made.float_figures.accuracy}}


def _opened(folder: Path, plugins: Plugins) -> tuple[Callable[[Batch], Any], Sequence[GraphInput], Callable[[], None]]:
    """How to run the network in a folder: what it gives for a batch, its inputs, and how to end."""
    written = artifact_format(folder)
    if written is None:
        graph = QuantizedGraph.open(folder).graph()
        return lambda batch: graph.run(batch)[0].numpy(), graph.inputs, lambda: None
    runtime = next((one for one in plugins.runtimes.values() if written in one.formats and not missing_modules(one)), None)
    if runtime is None:
        raise NoRouteError(f"nothing installed opens `{written}`", hint=f"`pip install qhub-{written.replace('onnx', 'onnxruntime')}`")
    session = runtime.open_graph(folder)
    return partial(_first, session), session.inputs, session.close


def _float_outputs(recipe: Recipe | None, found: Feed) -> list[Any] | None:
    """The float network's outputs; None where it is no longer there."""
    if recipe is None or not Path(recipe.model_path).exists():
        return None
    graph = open_graph(source_of(recipe), found.sample())
    return [graph.run(batch)[0].numpy() for batch in found.into(graph.inputs).batches()]


def _is_unit(folder: Path) -> bool:
    return bool(QuantizedGraph.described(folder)["outputs"][0] == EMBEDDING)


def _figures(made: Comparison, *, quantized: bool) -> dict[str, Any]:
    found = made.figures if quantized else made.float_figures
    return {name: getattr(found, name) for name in ("accuracy", "perplexity", "kl", "top1_agreement", "cosine")}


def _warn_of_ranges(recipe: Recipe, found: Feed, events: Events) -> None:
    """Say when calibration and evaluation feed other values: the seeds' "calibration crash"."""
    from qhub.data.ranges import collect_ranges, compare_ranges

    if recipe.calibration is None:
        return
    calibrated = collect_ranges(feed(recipe, recipe.calibration, seed=recipe.seed or None).batches())
    for text in compare_ranges(calibrated, collect_ranges(found.batches())):
        events.warning(text)


def first_items(recipe: Recipe) -> Feed:
    """The items that artifacts are compared on."""
    data = recipe.evaluation or recipe.calibration
    if data is None:
        raise QhubError("the recipe names no data", hint="give them with `--calib` and `--eval`")
    return feed(recipe, replace(data, samples=min(VERIFIED_ITEMS, data.samples)))
