"""`qhub inspect`: what a model or a quantized folder is, from its headers; nothing is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.route.sizes import ClassSize
    from qhub.types import ModelProfile

QHUB_JSON = "qhub.json"
UNKNOWN = "unknown"
#: Context that memory is stated for where the user names none, as `qhub recommend` plans for.
PLANNED_CONTEXT = 4096
_WHERE = {"safetensors": "folder", "config": "folder", "hub": "on the hub"}
_PACKED = re.compile(r"[iu]\d+")


@click.command()
@click.argument("path")
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens of key-value cache that memory is stated for.")
@click.option("--layers", is_flag=True, help="Also every matrix, with its shape.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def inspect(app: App, path: str, *, context: int | None, layers: bool, as_json: bool) -> None:
    """Say what the model at PATH is: parameters, bytes at every precision, memory, blocks, context, quantized or not.

    PATH is a model folder (also one with only a config.json), a quantized folder, a .onnx, .pt2, .gguf or .tflite file, a name
    such as demo:llm, or a model of the hub, whose headers alone are fetched.
    """
    from qhub.route.profile import profile
    from qhub.route.sizes import by_class, cache_bytes, memory
    from qhub.types import as_json as to_json

    model = profile(_network_file(path) or path, app.plugins)
    there = Path(model.path)
    classes, quantized = by_class(model), quantized_as(there.parent if there.is_file() else there)
    tokens = context or min(model.context_length or PLANNED_CONTEXT, PLANNED_CONTEXT)
    _warn(app, model, context)
    if as_json:
        needed = {"context_tokens": tokens, "cache_bytes": cache_bytes(model, tokens), "at": to_json(memory(model, tokens))}
        app.output.json({**to_json(model), "classes": to_json(classes), "memory": needed, "quantized": quantized})
        return
    app.output.table(("", model.source), _facts(model, quantized))
    _show_classes(app, classes)
    _show_memory(app, model, tokens)
    if layers:
        _show_layers(app, model)


def _network_file(path: str) -> str | None:
    """The file of the network, where PATH is a folder (or a run) that holds a quantized one."""
    from qhub.graph.store import is_graph

    folders = [folder for folder in (Path(path), Path(path) / "quantized") if is_graph(folder)]
    files = [file for folder in folders for name in ("model.pt2", "model.onnx") if (file := folder / name).is_file()]
    return str(files[0]) if files else None


def quantized_as(folder: Path) -> dict[str, Any] | None:
    """Scheme and method of a folder that qhub quantized, from its `qhub.json`; None for any other.

    :raises QhubError: when the file is there and is not what qhub writes.
    """
    from qhub.errors import QhubError

    path = folder / QHUB_JSON
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {key: data.get(key) for key in ("kind", "scheme", "method", "recipe_digest")}
    except (ValueError, AttributeError):
        raise QhubError(f"`{path}` is not what qhub writes", hint="quantize the model again") from None


def _warn(app: App, model: ModelProfile, context: int | None) -> None:
    if context is not None and model.kv_bytes_per_token is None:
        app.output.warning(f"`{model.source}` has no key-value cache that could be told: --context changes nothing")
    elif context is not None and model.context_length is not None and context > model.context_length:
        app.output.warning(f"`{model.source}` was made for a context of {model.context_length} tokens, not {context}")
    if not model.complete:
        app.output.warning(f"the weights of `{model.source}` do not follow from its config: what they weigh is unknown")


def _show_classes(app: App, classes: list[ClassSize]) -> None:
    if not classes:
        return
    from qhub.route.sizes import PRECISIONS

    columns = ("weights", "tensors", "parameters", "stored", *PRECISIONS)
    rows = [
        (row.kind, str(row.tensors), f"{row.parameters:,}", *map(human_bytes, (row.stored_bytes, *row.bytes.values()))) for row in classes
    ]
    app.output.print()
    app.output.table(columns, rows, right=columns[1:])


def _show_memory(app: App, model: ModelProfile, tokens: int) -> None:
    from qhub.route.sizes import memory

    rows = [(row.precision, human_bytes(row.weight_bytes), human_bytes(row.total_bytes)) for row in memory(model, tokens)]
    if rows:
        columns = ("blocks at", "all weights", f"with {tokens} tokens of cache")
        app.output.print()
        app.output.table(columns, rows, right=columns[1:])


def _show_layers(app: App, model: ModelProfile) -> None:
    from qhub.route.sizes import matrices

    rows = [(name, " × ".join(map(str, shape)), str(count)) for name, shape, count in matrices(model)]
    app.output.print()
    app.output.table(("matrix", "shape", "times"), rows, right=("shape", "times"))


def _facts(model: ModelProfile, quantized: dict[str, Any] | None) -> list[tuple[str, str]]:
    none = UNKNOWN if model.task == "llm" else "–"
    cache = none if model.kv_bytes_per_token is None else f"{human_bytes(model.kv_bytes_per_token)} per token at 16 bit"
    facts = [
        (_WHERE.get(model.format, "file"), model.path),
        ("architecture", f"{model.architecture} ({model.task})"),
        ("parameters", f"{model.parameters:,}" if model.parameters else UNKNOWN),
        ("weights", _weights(model)),
        ("blocks", str(model.blocks or none)),
        ("context", f"{model.context_length} tokens" if model.context_length else none),
        ("key-value cache", cache),
        ("vocabulary", str(model.vocabulary or none)),
    ]
    if model.task == "llm":
        facts.append(("embeddings", "tied to the head" if model.tied_embeddings else "not tied"))
    facts.append(("tokenizer", "yes" if model.has_tokenizer else "no"))
    return [*facts, ("quantized", _quantized(model, quantized))]


def _weights(model: ModelProfile) -> str:
    if not model.complete:
        return UNKNOWN
    dtype = "" if _PACKED.fullmatch(model.dtype) or model.dtype == UNKNOWN else f" in {model.dtype}"
    return f"{human_bytes(model.weight_bytes)}{dtype}" + (", not here: from the config" if model.format == "config" else "")


def _quantized(model: ModelProfile, quantized: dict[str, Any] | None) -> str:
    method = model.quantization or "no"
    return method if quantized is None else f"{method}: {quantized['method']} at {quantized['scheme']}, by qhub"
