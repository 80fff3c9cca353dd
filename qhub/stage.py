"""The stages of a run, each a function from files to files: `python -m qhub.stage NAME RUN_DIR` runs one by itself.

quantize: recipe.yaml → quantized/, work/block_errors.json · export: quantized/ → artifact/, work/artifacts.json · verify: artifact/ →
work/parity.json · evaluate: quantized/ → work/evaluation.json · report: all of these → report.json, report.html
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qhub.errors import PluginError, QhubError, UsageError
from qhub.events import Events
from qhub.graph.store import is_graph
from qhub.interfaces import Exporter, GraphQuantizer, Quantizer, WholeModel
from qhub.plugins import Plugins, missing_modules, suggest
from qhub.quiet import quiet_libraries
from qhub.route.recipe import digest, from_yaml
from qhub.rundir import RunDir
from qhub.types import Calibration, Recipe, as_json

#: What an OSError that names no file says of the disk; any other (the network is not there) is of whoever raised it.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
Stage = Callable[[RunDir, Recipe, Plugins, Events], None]


def quantize(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Walk over the model's blocks; `quantized/` appears when all of it is there."""
    import torch

    from qhub import networks
    from qhub.quantize.block import LayerChoice
    from qhub.quantize.store import finish
    from qhub.quantize.walk import WalkPlan, clean, walk
    from qhub.quantize.whole import quantize_whole
    from qhub.skeleton import model_config

    if run.quantized.exists():  # the process ended after the rename, before the state was saved
        clean(run.work)
        return
    quantizer = _quantizer(recipe, plugins)
    source = Path(recipe.model_path)
    run.partial.mkdir(exist_ok=True)
    if isinstance(quantizer, GraphQuantizer):
        networks.quantize(run, recipe, plugins, quantizer, events)
        run.write("work/block_errors.json", [])
        sync(run.partial)
        run.partial.rename(run.quantized)
        return
    model_config(source, trust_remote_code=run.settings.trust_remote_code)
    if recipe.evaluation is not None:
        _windows(run, recipe, recipe.evaluation)  # too short a text is said now, not when all the work is done
    ids = torch.from_numpy(_windows(run, recipe, recipe.calibration)) if quantizer.needs and recipe.calibration else None
    plan = WalkPlan(
        source=source,
        out=run.partial,
        work=run.work,
        quantizer=quantizer,
        choice=LayerChoice.of_recipe(recipe),
        ids=ids,
        device=run.settings.device,
        hidden_limit_bytes=hidden_limit_bytes(run.settings.max_memory_bytes),
        max_memory_bytes=run.settings.max_memory_bytes,
        trust_remote_code=run.settings.trust_remote_code,
    )
    result = quantize_whole(plan, quantizer, events) if isinstance(quantizer, WholeModel) else walk(plan, events)
    if not result.schemes:
        raise QhubError("no layer was quantized: every one is kept in float", hint="check the overrides of the recipe")
    metadata = {
        "method": recipe.method,
        "scheme": recipe.scheme,
        "recipe_digest": digest(recipe),
        "layers": {name: str(scheme) for name, scheme in result.schemes.items()},
        "notes": result.notes,
        "transposed": result.transposed,
        "subclassed": result.subclassed,
    }
    finish(run.partial, source, result.schemes, result.ignored, metadata)
    run.write("work/block_errors.json", result.errors)  # not in the QuantizedModel: their last digits follow the number of threads
    sync(run.partial)
    run.partial.rename(run.quantized)
    clean(run.work)


def sync(folder: Path) -> None:
    """Make sure that the files of `folder` are on the disk, so that a name that says "complete" never lies."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def export(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Let the exporter write the artifact; without an exporter the QuantizedModel is the result."""
    from qhub.quantize.store import open_model

    written = []
    if recipe.exporter is not None:
        exporter: Exporter = _component(plugins.exporters, recipe.exporter, "exporter")
        out = run.artifacts / exporter.format
        shutil.rmtree(out, ignore_errors=True)
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        artifact = as_json(exporter.export(open_model(run.quantized), partial, recipe))
        partial.rename(out)
        written.append({**artifact, "path": str(out.relative_to(run.path))})
    run.write("work/artifacts.json", written)


def verify(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Open each artifact in its runtime and compare it with the QuantizedModel; one that is not the same fails the run."""
    if is_graph(run.quantized):
        from qhub import networks

        networks.verify(run, recipe, plugins, events)
        return
    from qhub.prove.parity import compare_codes, compare_logits

    checks: dict[str, Any] = {}
    exporter = plugins.exporters.get(recipe.exporter or "")
    exporter = None if exporter is None or missing_modules(exporter) else exporter
    for artifact in run.read("work/artifacts.json"):
        runtime = runtime_for(recipe, artifact["format"], plugins)
        lacking = "a runtime for this format" if runtime is None else ", ".join(missing_modules(runtime))
        if runtime is None or lacking:
            checks[artifact["path"]] = compare_codes(
                run.quantized, run.path / artifact["path"], f"{lacking} is not installed here", exporter
            )
            continue
        ids = _windows(run, recipe, recipe.evaluation or recipe.calibration, first=64)
        checks[artifact["path"]] = compare_logits(run.quantized, run.path / artifact["path"], runtime, ids, exporter)
    run.write("work/parity.json", checks)


def evaluate(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Measure the float model, plain rounding and the chosen method on the same windows, or items."""
    if is_graph(run.quantized):
        from qhub import networks

        networks.evaluate(run, recipe, events)
        return
    import torch

    from qhub.prove.evaluate import Evaluation, Setting
    from qhub.quantize.baseline import RoundedWeights
    from qhub.quantize.store import QuantizedWeights
    from qhub.skeleton import FloatWeights

    if recipe.evaluation is None:
        raise QhubError("the recipe names no evaluation data", hint="give a text with `--eval`")
    ids = torch.from_numpy(_windows(run, recipe, recipe.evaluation))
    limit = hidden_limit_bytes(run.settings.max_memory_bytes)
    setting = Setting(run.work, run.settings.device, limit, run.settings.trust_remote_code)
    source, quantized = Path(recipe.model_path), QuantizedWeights(run.quantized)
    evaluation = Evaluation(FloatWeights(source), ids, setting, events)
    found = {"float": evaluation.float_figures(), "quantized": evaluation.compare(quantized, "quantized")}
    if recipe.method != "rtn":
        baseline = RoundedWeights(source, quantized.schemes, frozenset(quantized.metadata.get("transposed", ())))
        found["baseline"] = evaluation.compare(baseline, "rtn")
    run.write("work/evaluation.json", as_json(found))


def report(run: RunDir, recipe: Recipe, plugins: Plugins, events: Events) -> None:
    """Put together what the stages found."""
    from qhub.prove.assemble import assemble
    from qhub.prove.render import to_html

    optional = {name: run.read(f"work/{name}.json") for name in ("expected", "bench") if (run.path / f"work/{name}.json").exists()}
    found = assemble(
        recipe,
        digest(recipe),
        run.quantized,
        {**optional, **{name: run.read(f"work/{name}.json") for name in ("artifacts", "parity", "evaluation", "block_errors")}},
        run.log(),
        platform.node(),
    )
    found.save(run.path)
    html = run.path / "report.html.partial"
    html.write_text(to_html(found), encoding="utf-8")
    html.rename(run.path / "report.html")


STAGES: Mapping[str, Stage] = {"quantize": quantize, "export": export, "verify": verify, "evaluate": evaluate, "report": report}


def hidden_limit_bytes(max_memory_bytes: int | None) -> int:
    """How much memory hidden states may take before they go to disk: a quarter of the bound, else 512 MiB."""
    return 512 << 20 if max_memory_bytes is None else max_memory_bytes // 4


def _quantizer(recipe: Recipe, plugins: Plugins) -> Quantizer:
    from qhub.quantize.compose import compose

    parts = []
    for name in recipe.method.split("+"):
        found = _component(plugins.quantizers, name, "quantizer")
        parts.append(type(found)(**recipe.options.get(name, {})))
    return compose(parts)


def _component(components: Mapping[str, Any], name: str, kind: str) -> Any:  # noqa: ANN401 - a component
    if name not in components:
        raise UsageError(f"unknown {kind} `{name}`", hint=suggest(name, components))
    return components[name]


def runtime_for(recipe: Recipe, written_format: str, plugins: Plugins) -> Any:  # noqa: ANN401 - a runtime or None
    """The recipe's engine, or another one that opens files of the format."""
    other = next((runtime for runtime in plugins.runtimes.values() if written_format in runtime.formats), None)
    return plugins.runtimes.get(recipe.runtime or "") or other


def _windows(run: RunDir, recipe: Recipe, data: Calibration | None, *, first: int | None = None) -> Any:  # noqa: ANN401 - NDArray
    """The token windows of `data`, or only the beginning of the first one."""
    from qhub.tokens import load_tokenizer, read_windows

    if data is None:
        raise QhubError("the recipe names no data", hint="give a text with `--calib` and `--eval`")
    tokenizer = load_tokenizer(Path(recipe.model_path), trust_remote_code=run.settings.trust_remote_code)
    calibrating = data is recipe.calibration
    seed = recipe.seed if calibrating and recipe.seed else None
    samples, seq_len = (data.samples, data.seq_len) if first is None else (1, min(first, data.seq_len))
    return read_windows(tokenizer, Path(data.data), samples, seq_len, seed=seed, fewer="--samples" if calibrating else None).ids


def execute(name: str, run: RunDir, plugins: Plugins, events: Events) -> RunDir:
    """Run stage `name` from the files in `run`; returns the run with it done.

    :raises PluginError: when a plugin's own code failed, naming the method.
    """
    recipe = from_yaml(run.recipe.read_text(encoding="utf-8"))
    run.work.mkdir(exist_ok=True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: two blocks of 1.1B shape took 54 s, not 69
    with events.stage(name), quiet_libraries():
        try:
            STAGES[name](run, recipe, plugins, events)
        except (QhubError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_DISK):
                raise
            known = as_system_error(error)
            if known is not None:
                raise known from error
            who = {"quantize": recipe.method, "export": recipe.exporter, "verify": recipe.runtime or recipe.exporter}.get(name)
            if who is None or os.environ.get("QHUB_TRACEBACK"):
                raise
            text = str(error).strip().splitlines()[0] if str(error).strip() else ""
            message = f"stage `{name}` failed in `{who}`: {type(error).__name__}: {text}"
            raise PluginError(message, hint="run it again with `QHUB_TRACEBACK=1` set and report what it prints") from error
    return run.finished(name)


def as_system_error(error: Exception) -> Exception | None:
    """A full disk or exhausted memory, which libraries report in exceptions of their own."""
    text = str(error)
    if "No space left on device" in text or "os error 28" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text:
        return MemoryError(text)
    return None


def main(arguments: list[str]) -> int:
    """`python -m qhub.stage NAME RUN_DIR`: run one stage, with progress as JSON lines on stdout; a failure is the last of them."""
    if len(arguments) != 2 or arguments[0] not in STAGES:
        print(f"usage: python -m qhub.stage {{{','.join(STAGES)}}} RUN_DIR", file=sys.stderr)
        return 2
    stdout = sys.stdout  # stages have theirs redirected

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=stdout, flush=True)

    try:
        run = RunDir.open(Path(arguments[1]))
        execute(arguments[0], run, Plugins.load(), Events(run.events, tell))
    except QhubError as error:
        tell({"event": "error", "kind": type(error).__name__, "message": error.message, "hint": error.hint})
        print(error.text, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
