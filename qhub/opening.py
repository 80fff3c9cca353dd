"""Which files and which engine: what `qhub bench` and `qhub chat` open."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qhub.errors import NoRouteError, QhubError, Unsupported, UsageError, failure_of
from qhub.feeding import vocabulary_of
from qhub.graph.store import artifact_format, is_graph
from qhub.interfaces import Runtime
from qhub.isolation.proxies import home_of
from qhub.plugins import Plugins, missing_modules, suggest
from qhub.route.config import number, quantization_of, read_config, text_config, whole
from qhub.route.host import detect
from qhub.route.registry import load_registry
from qhub.route.ways import ask
from qhub.rundir import STATE, RunDir
from qhub.types import Target

_T = TypeVar("_T")


@dataclass(frozen=True)
class Opening:
    """A folder to open, and the engines to try, best first. `vocabulary` and `context` (tokens) are None where its config does not say.

    `network`: it holds a network that is no language model.
    """

    path: Path
    runtimes: tuple[Runtime, ...]
    vocabulary: int | None
    context: int | None
    network: bool = False


def opening(path: Path, plugins: Plugins, runtime: str | None) -> Opening:
    """What to open at `path`, a run or an artifact's folder, with the engine named `runtime` or else those that serve here.

    :raises UsageError: when the engine is unknown. :raises NoRouteError: when none works here.
    :raises QhubError: when there is no model at `path`.
    """
    folder = _folder(path)
    if is_graph(folder):
        return _of_network(folder, plugins, runtime)
    config = read_config(folder)
    text, here = text_config(config), detect()
    chosen = _named(runtime, plugins, here) if runtime is not None else _serving(plugins, here, quantization_of(config))
    return Opening(folder, chosen, whole(text.get("vocab_size")), number(text, "context"))


def _of_network(folder: Path, plugins: Plugins, runtime: str | None) -> Opening:
    """The artifact of a network; of a run, the first that something here opens.

    :raises NoRouteError: when nothing installed opens one.
    """
    beside = sorted(folder.parent.glob("artifact/*")) if folder.name == "quantized" else []
    vocabulary = vocabulary_of(folder)
    for candidate in (folder, *beside):
        written = artifact_format(candidate)
        if written is None:
            continue
        chosen = _named(runtime, plugins, detect()) if runtime is not None else _opening_format(written, plugins)
        if chosen:
            return Opening(candidate, chosen, vocabulary, None, network=True)
    message = f"nothing installed opens the network in `{folder}`"
    raise NoRouteError(message, hint="`pip install qhub-onnxruntime`, then `qhub run MODEL --plugin onnxruntime`")


def _opening_format(written: str, plugins: Plugins) -> tuple[Runtime, ...]:
    here = detect()
    return tuple(runtime for runtime in plugins.runtimes.values() if written in runtime.formats and _why_not(runtime, here) is None)


def first_that_opens(found: Opening, use: Callable[[Runtime], _T], warn: Callable[[str], None]) -> _T:
    """`use` of the first engine that does not refuse the model; each refusal but the last is said.

    :raises Unsupported: the last engine's refusal.
    """
    for runtime, following in zip(found.runtimes, found.runtimes[1:], strict=False):
        try:
            return use(runtime)
        except Unsupported as error:
            warn(f"{error.message}; taking `{following.name}`")
    return use(found.runtimes[-1])


def blaming(runtime: Runtime, work: Callable[[], _T]) -> _T:
    """What `work` returns; what goes wrong in the engine's own code is said to be its.

    :raises PluginError: naming the engine.
    """
    try:
        return work()
    except (QhubError, OSError, MemoryError):
        raise
    except Exception as error:
        if os.environ.get("QHUB_TRACEBACK"):
            raise
        raise failure_of(runtime.name, error) from error


def _folder(path: Path) -> Path:
    """The model's folder: in a run, the one that was quantized."""
    if not path.exists():
        raise UsageError(f"`{path}` does not exist", hint="give a run, or the folder of an artifact")
    if not (path / STATE).exists():
        return path
    run = RunDir.open(path)
    if not run.quantized.is_dir():
        raise QhubError(f"the run `{path}` has not quantized its model yet", hint=f"finish it: `qhub run --resume --out {path}`")
    return run.quantized


def _named(name: str, plugins: Plugins, here: Target) -> tuple[Runtime, ...]:
    runtime = plugins.runtimes.get(name)
    if runtime is None:
        raise UsageError(f"unknown runtime `{name}`", hint=suggest(name, plugins.runtimes))
    why = _why_not(runtime, here)
    if why is not None:
        raise NoRouteError(f"`{name}` does not work here: {why}", hint="`qhub plugins` shows what is installed")
    return (runtime,)


def _serving(plugins: Plugins, here: Target, layout: str | None) -> tuple[Runtime, ...]:
    """The installed engines that work here, of those that know the layout if any does; in the registry's order for this device."""
    reasons = {name: _why_not(runtime, here) for name, runtime in plugins.runtimes.items()}
    there = [runtime for name, runtime in plugins.runtimes.items() if reasons[name] is None]
    if not there:
        said = "; ".join(f"`{name}`: {why}" for name, why in reasons.items()) or "none is installed"
        raise NoRouteError(f"no runtime works here: {said}", hint="`pip install qhub-hf`")
    there = [runtime for runtime in there if layout in runtime.formats] or there
    return tuple(sorted(there, key=lambda runtime: _place(runtime, there, here)))


def _place(runtime: Runtime, there: Sequence[Runtime], here: Target) -> tuple[Any, ...]:
    order = [entry.name for entry in load_registry().finishers(here, "llm")]
    return (order.index(runtime.name) if runtime.name in order else len(order), runtime.name)


def _why_not(runtime: Runtime, here: Target) -> str | None:
    home, lacking = home_of(runtime), missing_modules(runtime)
    if home is not None:
        return f"it lives in the environment `{home.name}`"
    if lacking:
        return f"`{'`, `'.join(lacking)}` cannot be imported (`pip install {runtime.distribution or f'qhub-{runtime.name}'}`)"
    return ask(runtime.reject, here)
