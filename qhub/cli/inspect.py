"""`qhub inspect`: what a model or a quantized folder is, from its headers; nothing is loaded."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.types import ModelProfile

QHUB_JSON = "qhub.json"


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def inspect(app: App, path: str, *, as_json: bool) -> None:
    """Say what the model at PATH is: parameters, bytes by kind of weight, blocks, context, quantized or not.

    PATH is a model folder, a quantized folder, or a name such as demo:llm.
    """
    from qhub.route.profile import profile
    from qhub.types import as_json as to_json

    model = profile(path, app.plugins)
    classes = bytes_by_class(model)
    quantized = quantized_as(Path(model.path))
    if as_json:
        app.output.json({**to_json(model), "classes": classes, "quantized": quantized})
        return
    app.output.table(("", model.source), _facts(model, quantized))
    rows = [
        (
            row["class"],
            str(row["tensors"]),
            f"{row['parameters']:,}",
            *(human_bytes(row[key]) for key in ("stored_bytes", "bytes_8bit", "bytes_4bit")),
        )
        for row in classes
    ]
    columns = ("weights", "tensors", "parameters", "stored", "at 8 bit", "at 4 bit")
    app.output.print()
    app.output.table(columns, rows, right=columns[1:])


def bytes_by_class(model: ModelProfile) -> list[dict[str, Any]]:
    """For each kind of weight: how many, bytes as stored, and bytes of its matrices at 8 and 4 bit (groups of 128)."""
    from qhub.types import Scheme

    rows: dict[str, dict[str, Any]] = {}
    for layer in model.layers:
        empty = {"class": layer.kind, "tensors": 0, "parameters": 0, "stored_bytes": 0, "bytes_8bit": 0, "bytes_4bit": 0}
        row = rows.setdefault(layer.kind, empty)
        count = prod(layer.shape)
        row["tensors"] += 1
        row["parameters"] += count
        row["stored_bytes"] += layer.bytes
        for key, scheme in (("bytes_8bit", "w8a16"), ("bytes_4bit", "w4a16-g128-asym")):
            bits = Scheme.parse(scheme).bits_per_weight if len(layer.shape) > 1 else 16
            row[key] += round(count * bits / 8)
    return sorted(rows.values(), key=lambda row: -row["stored_bytes"])


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


def _facts(model: ModelProfile, quantized: dict[str, Any] | None) -> list[tuple[str, str]]:
    method = model.quantization or "no"
    if quantized is not None:
        method = f"{method}: {quantized['method']} at {quantized['scheme']}, by qhub"
    cache = "–" if model.kv_bytes_per_token is None else f"{human_bytes(model.kv_bytes_per_token)} per token at 16 bit"
    return [
        ("folder", model.path),
        ("architecture", f"{model.architecture} ({model.task})"),
        ("parameters", f"{model.parameters:,}"),
        ("weights", human_bytes(model.weight_bytes) + ("" if model.dtype.startswith(("i", "u")) else f" in {model.dtype}")),
        ("blocks", str(model.blocks or "–")),
        ("context", f"{model.context_length} tokens" if model.context_length else "–"),
        ("key-value cache", cache),
        ("vocabulary", str(model.vocabulary or "–")),
        ("embeddings", "tied to the head" if model.tied_embeddings else "not tied"),
        ("tokenizer", "yes" if model.has_tokenizer else "no"),
        ("quantized", method),
    ]
