"""One layout into another: the same codes, scales and zeros, read back from the disk and compared.

A shard per decoder block and one for everything else, as in `qhub/quantize/store.py`: no more than a block is in memory, and
the same model gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qhub.errors import DamagedModelError, Unsupported, UsageError
from qhub.events import Events, Progress
from qhub.quantize.layouts.base import Layout, ModelFacts, StoredLayer
from qhub.quantize.layouts.reader import LAYOUTS, PackedWeights, open_packed
from qhub.quantize.store import COPIED, FORMAT_VERSION, METADATA, shard_name, write_index, write_json, write_shard

_OTHERS_COPIED = (*COPIED, "preprocessor_config.json", "processor_config.json", "*.py")


@dataclass(frozen=True)
class Written:
    """What `write_layout` wrote: how many layers, with what warnings. All of them were read back and found identical."""

    layers: int
    was: str
    schemes: Mapping[str, int]
    warnings: tuple[str, ...] = ()


def write_layout(source: Path, out: Path, to: str, events: Events | None = None) -> Written:
    """Write the quantized model in `source` into the empty directory `out` in layout `to`.

    :raises UsageError: when there is no such layout, or it is stored so already. :raises Unsupported: when the layout cannot
        carry the model, naming why and how many layers. :raises DamagedModelError: when the model contradicts itself.
    """
    weights, layout = open_packed(source), layout_called(to)
    if weights.layout is layout:
        raise UsageError(f"`{source}` already is stored as `{to}`", hint=f"others are {', '.join(name for name in LAYOUTS if name != to)}")
    events = events or Events()
    shards = _shards([*weights.float_names(), *weights.layers])
    warnings, model = _checked(weights, layout, shards, events)
    progress = Progress(events, f"write {to}", len(shards))
    for index, names in enumerate(shards):
        write_shard(out / shard_name(index, len(shards)), dict(_tensors(names, weights, layout, model)))
        progress.block(index, shard_name(index, len(shards)))
    _finish(weights, out, layout, model)
    _compare(weights, open_packed(out))
    schemes = [str(facts.scheme) for facts in weights.layers.values()]
    return Written(len(schemes), weights.layout.name, {name: schemes.count(name) for name in sorted(set(schemes))}, warnings)


def layout_called(name: str) -> Layout:
    """The layout that users call `name`.

    :raises UsageError: when there is none.
    """
    if name not in LAYOUTS:
        raise UsageError(f"unknown layout `{name}`", hint=f"one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _checked(weights: PackedWeights, layout: Layout, shards: list[list[str]], events: Events) -> tuple[tuple[str, ...], ModelFacts]:
    """Warnings, and what `layout` has to know; reads every layer once, so that a refusal comes before anything is written."""
    refused: dict[str, list[str]] = {}
    reordered, rounded, dtype = False, [], weights.model_dtype()
    progress = Progress(events, "check", len(shards))
    for index, names in enumerate(shards):
        for name in (name for name in names if name in weights.layers):
            layer = weights.layer(name)
            reordered |= layer.groups is not None
            if not torch.equal(layer.scale.to(dtype).float(), layer.scale):
                rounded.append(name)
            if why := _contradiction(layer) or layout.refuse_numbers(layer):
                refused.setdefault(why, []).append(name)
        progress.block(index, shard_name(index, len(shards)))
    model = _model_facts(weights, layout, dtype, reordered=reordered)
    why = layout.refuse(model) or next((_counted(text, names) for text, names in refused.items()), None)
    if why is not None:
        others = ", ".join(name for name in LAYOUTS if name not in (layout.name, weights.layout.name))
        raise Unsupported(f"`{layout.name}` cannot carry `{weights.folder}`: {why}", hint=f"try another layout: {others}")
    if not rounded or layout.name != "compressed-tensors":
        return (), model
    text = f"the scales of {{}} are no numbers of the model's {_short(dtype)}; readers that cast them to it round them"
    return (_counted(text, rounded),), model


def _contradiction(layer: StoredLayer) -> str | None:
    half = 2.0 ** (layer.scheme.weight_bits - 1)
    if layer.scheme.symmetric and not bool((layer.zero == half).all()):
        return "its config says symmetric, but the zeros of {} are others"
    if bool((layer.zero > 2**layer.scheme.weight_bits - 1).any()):
        return "zeros of {} are outside the codes"
    return None


def _counted(text: str, names: list[str]) -> str:
    return text.format(f"{len(names)} layers (`{names[0]}`, …)" if len(names) > 1 else f"layer `{names[0]}`")


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))


def _model_facts(weights: PackedWeights, layout: Layout, dtype: torch.dtype, *, reordered: bool) -> ModelFacts:
    transposed = weights.transposed if layout.name == "compressed-tensors" else frozenset()
    expand = bool(weights.metadata.get("subclassed"))
    return ModelFacts(weights.layers, dtype, _kept(weights), reordered, transposed, expand)


def _kept(weights: PackedWeights) -> list[str]:
    """The matrices that stay float: as the config lists them, else every one there is, and the head."""
    listed = weights.metadata.get("ignored") or weights.source.section.get("ignore")
    if weights.metadata and listed is not None:
        return [str(name) for name in listed]
    matrices = [name for name in weights.float_names() if name.endswith(".weight") and len(weights.files[name].shape) == 2]
    kept = {name.removesuffix(".weight") for name in matrices} | ({"lm_head"} - weights.layers.keys())
    return sorted(name for name in kept if "embed" not in name or "embed_out" in name)


def _shards(names: Iterable[str]) -> list[list[str]]:
    """The names by the block that they belong to, the first number in them; those of no block come first."""
    found: dict[tuple[int, str], list[str]] = {(-1, ""): []}
    for name in names:
        parts = name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        key = (-1, "") if place is None else (int(parts[place]), ".".join(parts[:place]))
        found.setdefault(key, []).append(name)
    return [found[key] for key in sorted(found) if found[key]]


def _tensors(names: Iterable[str], weights: PackedWeights, layout: Layout, model: ModelFacts) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        if name in weights.layers:
            yield from layout.tensors(name, weights.layer(name), model).items()
        else:
            yield name, weights.read(name)


def _finish(weights: PackedWeights, out: Path, layout: Layout, model: ModelFacts) -> None:
    """Index, config, tokenizer and what qhub knows of the model."""
    write_index(out)
    section = layout.section_of(model)
    config: dict[str, Any] = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("compression_config", None)
    write_json(out / "config.json", {**config, "quantization_config": section})
    if section["quant_method"] == "gptq":
        write_json(out / "quantize_config.json", section)  # where readers looked before config.json had a place for it
    for pattern in _OTHERS_COPIED:
        for path in sorted(weights.folder.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if weights.metadata:
        write_json(out / METADATA, {"format_version": FORMAT_VERSION, **_known(weights, layout)})


def _known(weights: PackedWeights, layout: Layout) -> dict[str, Any]:
    """`qhub.json`: what this layout's config cannot say is kept in it, and nothing else is added."""
    known = {key: value for key, value in weights.metadata.items() if key not in ("layout", "ignored")}
    return known if layout.name == "compressed-tensors" else {**known, "layout": layout.name, "ignored": _kept(weights)}


def _compare(source: PackedWeights, written: PackedWeights) -> None:
    """Read every layer back.

    :raises DamagedModelError: when one is not the same: the disk, or qhub itself, is at fault.
    """
    for name in source.layers:
        if name not in written.layers or not source.layer(name).equals(written.layer(name)):
            raise DamagedModelError(
                f"layer `{name}` was read back from `{written.folder}` changed", hint="check the disk, then report this"
            )
