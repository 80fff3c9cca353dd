"""A model → `ModelProfile`, from its config and tensor headers alone: no weight is read, nothing heavy imported."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qhub.errors import QhubError, UsageError
from qhub.route.layers import block_names, layer_shapes
from qhub.types import LayerShape, ModelProfile, ModelSource, Task
from qhub.weights import WeightFiles

if TYPE_CHECKING:
    from qhub.plugins import Plugins

CONFIG = "config.json"
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: The same number under the names that different architectures use.
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"),
}
#: (task, what its architectures contain; "^…" begin with; "…$" end with); the first that matches decides.
_TASKS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("speech", ("Whisper", "Wav2Vec2", "Hubert", "WavLM", "Speech", "Moonshine", "ForCTC", "AudioClassification", "Seamless")),
    ("detection", ("ForObjectDetection", "Detr", "Yolo")),
    ("vision", ("ForImageClassification", "ForSemanticSegmentation", "ForMaskedImageModeling")),
    ("vision", ("^ViT", "^ResNet", "^ConvNext", "^Swin", "^Dinov")),
    ("generative", ("UNet", "Autoencoder", "Transformer2DModel", "DiffusionPipeline", "StableDiffusion")),
    ("llm", ("ForCausalLM$", "LMHeadModel$")),
    ("nlp", ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice")),
    ("nlp", ("ForPreTraining", "^Bert", "^Roberta", "^DistilBert", "^Electra", "^Deberta")),
    ("nlp", ("^T5", "^Bart", "^MT5", "^Pegasus", "^Marian", "^MBart", "^M2M100")),
)
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def resolve(source: str, plugins: Plugins) -> ModelSource:
    """What the user means by `source`: a model folder, or a model that a plugin brings along (`demo:llm`).

    :raises UsageError: when it is neither. :raises QhubError: for a hub id, which has to be downloaded first.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return ModelSource(name=path.resolve().name, path=path, summary="model folder")
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
    """Profile a model by name or folder.

    :raises QhubError: when the folder is not a model folder, or its files are broken or contradict each other.
    """
    model = source if isinstance(source, ModelSource) else resolve(source, plugins)
    config = read_config(model.path)
    text = text_config(config)
    files = WeightFiles.open(model.path)
    layers = layer_shapes(files, {**text, "quantization_config": config.get("quantization_config")})
    task = task_of(config, model.path)
    quantization = quantization_of(config)
    if quantization is None:
        _check_shapes(model.path, text, layers, task)
    tied = task == "llm" and _is_tied(config, text, layers)
    return ModelProfile(
        source=model.name,
        path=str(model.path),
        task=task,
        architecture=architecture_of(config),
        parameters=sum(prod(layer.shape) for layer in layers if not (tied and layer.kind == "head")),
        dtype=_main_dtype(layers),
        weight_bytes=sum(info.bytes for info in files.values()),
        layers=layers,
        blocks=len(block_names(layer.name for layer in layers if layer.kind != "conv")) or None,
        hidden_size=_number(text, "hidden"),
        kv_bytes_per_token=kv_bytes_per_token(text) if task == "llm" else None,
        vocabulary=_int(text.get("vocab_size")),
        context_length=_number(text, "context"),
        has_tokenizer=any((model.path / name).exists() for name in _TOKENIZERS),
        tied_embeddings=tied,
        quantization=quantization,
        experts=_experts(text),
        experts_per_token=_int(text.get("num_experts_per_tok")),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`.

    :raises QhubError: when the folder has none, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise UsageError(f"`{folder}` is not a folder", hint="give a model folder, or a name such as `demo:llm`")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        parts = sorted(item.parent.name for item in folder.glob(f"*/{CONFIG}"))
        hint = f"it has parts; give one of them: {', '.join(parts)}" if parts else "a model folder holds config.json and *.safetensors"
        raise QhubError(f"`{folder}` is not a model folder: it has no {CONFIG}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise QhubError(f"`{path}` is not JSON: {error}", hint="download it again") from None
    if not isinstance(config, dict):
        raise QhubError(f"`{path}` holds `{type(config).__name__}` where a JSON object is expected", hint="download it again")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model; in a multimodal config that is a section of its own."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return {**config, **config[key]}
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class name that the config gives, or "unknown"."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return str(config.get("_class_name") or config.get("architecture") or "unknown")


def task_of(config: Mapping[str, Any], folder: Path) -> Task:
    """What the model is for, by its architecture; "unknown" rather than a guess."""
    if (folder / "modules.json").exists() or (folder / "config_sentence_transformers.json").exists():
        return "embedding"
    architecture = architecture_of(config)
    for task, patterns in _TASKS:
        if any(pattern.strip("^$") in architecture and _anchored(pattern, architecture) for pattern in patterns):
            return task
    if isinstance(config.get("text_config"), dict) and architecture.endswith("ForConditionalGeneration"):
        return "llm"  # a language model that also sees or hears
    return "vision" if "architecture" in config and "num_classes" in config else "unknown"  # timm's config


def _anchored(pattern: str, text: str) -> bool:
    if pattern.startswith("^"):
        return text.startswith(pattern[1:])
    return not pattern.endswith("$") or text.endswith(pattern[:-1])


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method that already quantized the model, by its config."""
    section = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if not isinstance(section, dict):
        return None
    return str(section.get("quant_method") or section.get("quant_type") or "unknown")


def kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes that one token adds to the key-value cache at 16 bits; None where there is no such cache or it cannot be told."""
    blocks, heads, hidden = (_number(config, key) for key in ("blocks", "heads", "hidden"))
    if blocks is None:
        return None
    if latent := _int(config.get("kv_lora_rank")):
        return 2 * blocks * (latent + (_int(config.get("qk_rope_head_dim")) or 0))
    if heads is None or not heads or hidden is None:
        return None
    head_dim = _int(config.get("head_dim")) or hidden // heads
    kv_heads = _number(config, "kv_heads") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1
    return 2 * 2 * blocks * kv_heads * head_dim


def _experts(config: Mapping[str, Any]) -> int | None:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for key in keys if (count := _int(config.get(key)))), None)


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any], layers: Iterable[LayerShape]) -> bool:
    """What the config says; where it says nothing, a language model without a head uses its embedding."""
    says = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return says if isinstance(says, bool) else not any(layer.kind == "head" for layer in layers)


def _main_dtype(layers: Iterable[LayerShape]) -> str:
    sizes: Counter[str] = Counter()
    for layer in layers:
        sizes[layer.dtype] += layer.bytes
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def _number(config: Mapping[str, Any], key: str) -> int | None:
    return next((number for name in _ALIASES[key] if (number := _int(config.get(name))) is not None), None)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _check_shapes(folder: Path, config: Mapping[str, Any], layers: Iterable[LayerShape], task: Task) -> None:
    """Refuse a language model whose config contradicts its tensors, before anything is spent on it."""
    if task != "llm":
        return
    vocabulary, blocks = _int(config.get("vocab_size")), _number(config, "blocks")
    for layer in layers:
        if layer.block is None and layer.name.endswith(_INPUT_EMBEDDINGS):
            _check_embedding(folder, layer, vocabulary, config)
    found = {layer.block for layer in layers if layer.kind in ("linear", "expert")}
    missing = sorted(set(range(blocks or 0)) - {block for block in found if block is not None})
    if missing and found:
        message = f"`{folder / CONFIG}` says `{blocks}` blocks, but block `{missing[0]}` has no weights"
        raise QhubError(message, hint="download the missing shard, or the config that belongs to these weights")


def _check_embedding(folder: Path, layer: LayerShape, vocabulary: int | None, config: Mapping[str, Any]) -> None:
    widths = [config.get(key) for key in ("word_embed_proj_dim", "embedding_size") if config.get(key)]
    width = widths[0] if widths else _number(config, "hidden")
    expected = (vocabulary or layer.shape[0], width or layer.shape[1])
    if layer.shape != expected:
        message = f"`{folder / CONFIG}` says vocabulary and width `{expected}`, but `{layer.name}` has shape `{layer.shape}`"
        raise QhubError(message, hint="download the config that belongs to these weights")
