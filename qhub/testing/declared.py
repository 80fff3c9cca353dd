"""What a plugin says of itself, checked without doing any work: import time, hooks, declarations, refusals."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from qhub.errors import QhubError
from qhub.interfaces import Component, Exporter, Quantizer, Runtime
from qhub.plugins import Plugins, missing_modules
from qhub.testing.probe import Job, Record, said
from qhub.testing.result import CheckFailedError
from qhub.types import Family, LayerShape, ModelProfile, Scheme

HEAVY = (
    "torch", "transformers", "tensorflow", "jax", "onnx", "onnxruntime", "openvino", "tensorrt", "coremltools", "mlx", "scipy",
    "pandas", "sklearn", "datasets", "huggingface_hub", "rich",
)  # fmt: skip
KINDS = {"quantizers": Quantizer, "exporters": Exporter, "runtimes": Runtime}
SCHEMES = (
    "w2a16-g64-asym", "w3a16-g64-asym", "w4a16-g128-asym", "w4a16-g128-sym", "w4a16-g32-asym", "w4a16-g32-sym", "w4a16-channel-asym",
    "w8a16", "w8a8-static", "w8a8-dynamic", "nf4", "fp16", "bf16",
)  # fmt: skip


def example_profile() -> ModelProfile:
    """A small Llama that is on no disk: who asks for its weights finds none."""
    layers = tuple(
        LayerShape(f"model.layers.{block}.{name}.weight", "linear", (256, 256), "BF16", 131072, block)
        for block in range(2)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    )
    return ModelProfile(
        source="example", path="/nonexistent/example", task="llm", architecture="LlamaForCausalLM", parameters=600_000, dtype="bf16",
        weight_bytes=1_200_000, layers=layers, blocks=2, hidden_size=256, kv_bytes_per_token=1024, vocabulary=128, context_length=2048,
        has_tokenizer=True,
    )  # fmt: skip


def _import(job: Job, record: Record, folder: Path) -> None:
    """Time the import of the plugin's module where all of qhub that a plugin needs is already there."""
    importlib.import_module("qhub.hookspecs")
    before, started = set(sys.modules), time.perf_counter()
    try:
        importlib.import_module(job.module.partition(":")[0])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's own code
        record.say(import_error=said(error))
        return
    seconds = time.perf_counter() - started
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    record.say(import_seconds=seconds, heavy=sorted(loaded & {*HEAVY, *job.modules}))


def _declare(job: Job, record: Record, folder: Path) -> None:
    """Load the plugin, call its hooks, and ask its components what they say."""
    plugins: list[Plugins] = []
    if not record.check("entry-point", "plugin", lambda: plugins.append(_load(job))):
        return
    components = [(kind[:-1], part) for kind in KINDS for part in getattr(plugins[0], kind).values()]
    requires = {name.partition(".")[0] for _, part in components for name in part.requires}
    facts = [{"kind": kind, "name": part.name, "missing": missing_modules(part)} for kind, part in components]
    record.say(components=facts, requires=sorted(requires))
    for kind, part in components:
        title = f"{kind} {part.name}"
        record.check("declarations", title, lambda kind=kind, part=part: _declarations(kind, part, job))  # type: ignore[misc]
        record.check("reject", title, lambda kind=kind, part=part: _refusals(kind, part))  # type: ignore[misc]


def _missing(job: Job, record: Record, folder: Path) -> None:
    """The same where none of the modules that the plugin requires can be imported."""
    for name in job.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    record.check("missing-modules", "plugin", lambda: _without_modules(job))


def _load(job: Job) -> Plugins:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins = Plugins.load()
        offers = plugins.components_of(job.plugin)
        for kind in offers:
            getattr(plugins, kind)  # the hub's own way of asking: it finds components of one name
    if said_so := [str(item.message) for item in caught]:
        raise CheckFailedError(said_so[0])
    if not any(offers.values()) and not hasattr(plugins.manager.get_plugin(job.plugin), "qhub_commands"):
        raise CheckFailedError("it has no hook that offers anything")
    return plugins


def _declarations(kind: str, part: Any, job: Job) -> None:  # noqa: ANN401 - a component
    wrong = [*_common(kind, part, job), *_OF_KIND[kind](part)]
    if wrong:
        raise CheckFailedError("; ".join(wrong))


def _common(kind: str, part: Component, job: Job) -> Iterator[str]:
    if not isinstance(part, KINDS[f"{kind}s"]):
        yield f"it is a `{type(part).__name__}`, not a `{KINDS[f'{kind}s'].__name__}`"
    if not part.name or part.name != part.name.strip().lower() or any(letter in part.name for letter in " +,/:="):
        yield f"name `{part.name}` is not lower case without spaces and `+,/:=`"
    if not part.summary or part.summary != part.summary.strip() or "\n" in part.summary:
        yield f"summary `{part.summary}` is not one line of text"
    if part.distribution != job.distribution:
        yield f"distribution is `{part.distribution}`, but `{job.distribution}` brings it"
    if not isinstance(part.requires, tuple) or not all(isinstance(name, str) for name in part.requires):
        yield f"requires is {part.requires!r}, not a tuple of module names"


def _quantizer(part: Quantizer) -> Iterator[str]:
    for family in (part.family, *part.families):
        if family not in get_args(Family):
            yield f"family `{family}` is none of {', '.join(get_args(Family))}"
    yield from _scheme(part.default_scheme)
    if unknown := sorted(set(part.needs) - {"gram", "shortfall", "abs_mean", "tokens", "items"}):
        yield f"needs names `{unknown[0]}`; there are gram, shortfall, abs_mean, tokens and items"
    if type(part)().settings != dict(part.options):
        yield "made without options, its settings are not the defaults in options"


def _scheme(text: str) -> Iterator[str]:
    try:
        if str(Scheme.parse(text)) != text:
            yield f"default_scheme `{text}` is written `{Scheme.parse(text)}`"
    except QhubError as error:
        yield f"default_scheme: {error.message}"


def _exporter(part: Exporter) -> Iterator[str]:
    if not part.format or part.format != part.format.strip().lower():
        yield f"format `{part.format}` is not a lower-case name"


def _runtime(part: Runtime) -> Iterator[str]:
    if not isinstance(part.formats, tuple) or not part.formats:
        yield f"formats is {part.formats!r}, not a tuple of the formats that it opens"


_OF_KIND: dict[str, Any] = {"quantizer": _quantizer, "exporter": _exporter, "runtime": _runtime}


def _refusals(kind: str, part: Any) -> None:  # noqa: ANN401 - a component
    if kind == "runtime":
        _check_answers({target.name: part.reject(target) for target in _targets()})
        return
    answers = {text: part.reject(example_profile(), Scheme.parse(text)) for text in SCHEMES}
    _check_answers(answers)
    if kind == "exporter":
        return
    own = part.reject(example_profile(), Scheme.parse(part.default_scheme))
    if own is not None and part.family == "weight-only":
        raise CheckFailedError(f"it refuses its own default scheme `{part.default_scheme}`: {own}")
    if all(answer is None for answer in answers.values()):
        raise CheckFailedError(f"it takes every scheme, among them {', '.join(SCHEMES[-5:])}: refuse what the method does not write")


def _targets() -> list[Any]:
    from qhub.route.host import detect
    from qhub.route.registry import load_registry

    return [detect(), *load_registry().targets.values()]


def _check_answers(answers: dict[str, Any]) -> None:
    for about, answer in answers.items():
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise CheckFailedError(f"its answer about `{about}` is {answer!r}, not a reason or None")


def _without_modules(job: Job) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plugins = Plugins.load()
        error = plugins.infos[0].error
        if error is not None:
            raise CheckFailedError(f"without `{'`, `'.join(job.modules)}` it does not load: {error}")
        offers = plugins.components_of(job.plugin)
    parts = [getattr(plugins, kind)[name] for kind in KINDS for name in offers.get(kind, ())]
    if not any(missing_modules(part) for part in parts):
        raise CheckFailedError(f"without `{'`, `'.join(job.modules)}` it still says that it is usable")


MODES = {"import": _import, "declare": _declare, "missing": _missing}
