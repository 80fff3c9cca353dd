"""A model → `ModelProfile`, from its config and tensor headers alone: no weight is read, nothing heavy imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qhub.errors import QhubError, UsageError
from qhub.route.config import (
    CONFIG,
    architecture_of,
    experts_of,
    is_tied,
    kv_bytes_per_token,
    number,
    quantization_of,
    read_config,
    task_of,
    text_config,
    whole,
)
from qhub.route.layers import block_names, layer_shapes, main_dtype
from qhub.types import LayerShape, ModelProfile, ModelSource, Task
from qhub.weights import PICKLES, TensorInfo, WeightFiles, no_weights, pickle_refused

if TYPE_CHECKING:
    from qhub.plugins import Plugins

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: Files that hold a whole network, which can be quantized as a graph.
NETWORKS = (".onnx", ".pt2")
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def resolve(source: str, plugins: Plugins, weights: Path | None = None) -> ModelSource:
    """What the user means by `source`: a model folder or file, a model that a plugin brings along (`demo:llm`), or a function.

    `weights` are those of the module that the function `source` (`module:function`) returns.

    :raises UsageError: when it is none of these. :raises QhubError: for a hub id, which has to be downloaded first.
    """
    if weights is not None:
        return _of_function(source, weights)
    path = Path(source).expanduser()
    if path.is_dir():
        return ModelSource(name=path.resolve().name, path=path, summary="model folder")
    if path.suffix.lower() in PICKLES and path.exists():
        raise pickle_refused(path)
    if path.is_file() and path.suffix.lower() in NETWORKS:
        return ModelSource(name=path.stem, path=path, summary="network in a file")
    if path.exists():
        raise UsageError(f"`{source}` is a file; a model is a folder with {CONFIG}", hint=f"give its folder: `{path.parent}`")
    models = plugins.models
    if source in models:
        return models[source]
    if re.fullmatch(_HUB_ID, source) and not source.startswith("."):
        command = f"hf download {source} --local-dir {source.partition('/')[2]}"
        raise QhubError(f"`{source}` is not a folder here; a model from the hub has to be downloaded first", hint=f"`{command}`")
    if "/" in source or "\\" in source or source.startswith(("~", ".")):
        raise UsageError(f"`{source}` does not exist", hint="give a model folder, or a name such as `demo:llm`")
    raise _unknown_model(source, models)


def _of_function(function: str, weights: Path) -> ModelSource:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
        raise UsageError(
            f"`{function}` is no function of a module", hint="with `--weights`, MODEL is `module:function`, e.g. `resnet:resnet20`"
        )
    if weights.suffix.lower() in PICKLES:
        raise pickle_refused(weights)
    if not weights.is_file():
        raise UsageError(f"weights `{weights}` do not exist", hint="give a .safetensors file of the module's state dict")
    return ModelSource(name=function, path=weights, summary="module of a function")


def _unknown_model(source: str, models: Iterable[str]) -> UsageError:
    from qhub.plugins import suggest

    plugin, colon, _ = source.partition(":")
    if not colon:
        brought = ", or a name that a plugin brings: " + ", ".join(sorted(models)) if models else ""
        hint = f"a model is a folder with {CONFIG} and *.safetensors{brought}"
    elif models:
        hint = suggest(source, models).replace(f"qhub-{source}", f"qhub-{plugin}")
    else:
        hint = f"`pip install qhub-{plugin}` may bring it"
    return UsageError(f"unknown model `{source}`: no folder and no plugin has that name", hint=hint)


def profile(source: str | ModelSource, plugins: Plugins) -> ModelProfile:
    """Profile a model: a folder (also one that has only a config), a file, a name that a plugin brings, or a hub id.

    Only a hub id leads to the network. A `ModelSource` is what a run starts from: a folder that has its weights.

    :raises QhubError: when it is no model, or its files are broken or contradict each other.
    """
    if isinstance(source, ModelSource) and source.path.is_file():
        return _of_file(source)
    if isinstance(source, ModelSource):
        return _of_folder(source, weightless=False)
    path = Path(source).expanduser()
    if path.is_file():
        from qhub.route.headers import profile_file

        return profile_file(path)
    if is_hub_id(source, plugins):
        from qhub.route.hub import profile_hub

        return profile_hub(source)
    return _of_folder(resolve(source, plugins), weightless=True)


def _of_file(model: ModelSource) -> ModelProfile:
    from qhub.route.headers import profile_file

    if model.path.suffix.lower() != ".safetensors":
        return replace(profile_file(model.path), source=model.name)
    files = WeightFiles.open_shards(model.path.parent, [model.path.name])
    layers = layer_shapes(files, {})
    found = ModelProfile(
        source=model.name,
        path=str(model.path),
        task="unknown",
        architecture=model.name,
        parameters=sum(prod(layer.shape) for layer in layers),
        dtype=main_dtype(layers),
        weight_bytes=sum(info.bytes for info in files.values()),
        layers=layers,
    )
    return found


def is_hub_id(source: str, plugins: Plugins) -> bool:
    """Whether `source` can only be a model of the Hugging Face hub: `organization/name`, and nothing here has that name."""
    there = Path(source).expanduser().exists() or source in plugins.models
    return not there and not source.startswith(".") and re.fullmatch(_HUB_ID, source) is not None


def _of_folder(model: ModelSource, *, weightless: bool) -> ModelProfile:
    config = read_config(model.path)
    if weightless and not any(model.path.glob("*.safetensors*")):
        return of_config(model, config)
    files = WeightFiles.open(model.path)
    return assemble(model, config, files, "safetensors")


def of_config(model: ModelSource, config: Mapping[str, Any]) -> ModelProfile:
    """The profile of a folder without weights: what follows from its config.

    :raises QhubError: when its weights are there, in a pickle.
    """
    if any(path.suffix in PICKLES for path in model.path.iterdir()):
        raise no_weights(model.path)
    from qhub.route.shapes import tensors_of

    return assemble(model, config, tensors_of(text_config(config), architecture_of(config), model.path), "config")


def assemble(model: ModelSource, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None, file_format: str) -> ModelProfile:
    """The profile of a model whose config and tensors are known; `tensors` None: only the config is, and does not say them."""
    text = text_config(config)
    layers = layer_shapes(tensors or {}, {**text, "quantization_config": config.get("quantization_config")})
    task, quantization = task_of(config, model.path), quantization_of(config)
    if quantization is None and tensors:
        _check_shapes(model.path, text, layers, task)
    # without weights, the bytes that another method stores them in are unknown
    complete = bool(tensors) and (file_format != "config" or quantization is None)
    found = ModelProfile(
        source=model.name,
        path=str(model.path),
        task=task,
        architecture=architecture_of(config),
        parameters=0,
        dtype=main_dtype(layers) if complete else "unknown",
        weight_bytes=sum(info.bytes for info in (tensors or {}).values()) if complete else 0,
        layers=layers,
        blocks=len(block_names(layer.name for layer in layers if layer.kind != "conv")) or number(text, "blocks"),
        hidden_size=number(text, "hidden"),
        kv_bytes_per_token=kv_bytes_per_token(text) if task == "llm" else None,
        vocabulary=whole(text.get("vocab_size")),
        context_length=number(text, "context"),
        has_tokenizer=any((model.path / name).exists() for name in _TOKENIZERS),
        tied_embeddings=task == "llm" and is_tied(config, text, layers),
        quantization=quantization,
        own_code="auto_map" in config,
        experts=experts_of(text),
        experts_per_token=whole(text.get("num_experts_per_tok")),
        format=file_format,
        complete=complete,
    )
    return replace(found, parameters=sum(prod(layer.shape) for layer in found.weights()))


def _check_shapes(folder: Path, config: Mapping[str, Any], layers: Iterable[LayerShape], task: Task) -> None:
    """Refuse a language model whose config contradicts its tensors, before anything is spent on it."""
    if task != "llm":
        return
    vocabulary, blocks = whole(config.get("vocab_size")), number(config, "blocks")
    for layer in layers:
        if layer.block is None and layer.name.endswith(_INPUT_EMBEDDINGS):
            _check_embedding(folder, layer, vocabulary, config)
    found = {layer.block for layer in layers if layer.kind in ("linear", "expert")}
    missing = next((index for index in range(blocks or 0) if index not in found), None)
    if missing is not None and found:
        message = f"`{folder / CONFIG}` says `{blocks}` blocks, but block `{missing}` has no weights"
        raise QhubError(message, hint="download the missing shard, or the config that belongs to these weights")


def _check_embedding(folder: Path, layer: LayerShape, vocabulary: int | None, config: Mapping[str, Any]) -> None:
    widths = [config.get(key) for key in ("word_embed_proj_dim", "embedding_size") if config.get(key)]
    width = widths[0] if widths else number(config, "hidden")
    expected = (vocabulary or layer.shape[0], width or layer.shape[1])
    if layer.shape != expected:
        message = f"`{folder / CONFIG}` says vocabulary and width `{expected}`, but `{layer.name}` has shape `{layer.shape}`"
        raise QhubError(message, hint="download the config that belongs to these weights")
