"""What a model's `config.json` says: what it is for, its sizes under the names of many architectures, how it was quantized."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qhub.errors import QhubError, UsageError
from qhub.types import LayerShape, Task

CONFIG = "config.json"
#: Formats in which a model is one file.
SUFFIXES = (".onnx", ".pt2", ".gguf", ".tflite")
#: The same number under the names that different architectures use.
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "context": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
        "max_target_positions",
    ),
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
        files = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in SUFFIXES)
        hint = f"it has parts; give one of them: {', '.join(parts)}" if parts else "a model folder holds config.json and *.safetensors"
        hint = f"give one of its files: {', '.join(files)}" if files and not parts else hint
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
    task = task_of_architecture(architecture)
    if task != "unknown":
        return task
    if isinstance(config.get("text_config"), dict) and architecture.endswith("ForConditionalGeneration"):
        return "llm"  # a language model that also sees or hears
    return "vision" if "architecture" in config and "num_classes" in config else "unknown"  # timm's config


def task_of_architecture(architecture: str) -> Task:
    """What models of a class are for, by its name."""
    for task, patterns in _TASKS:
        if any(pattern.strip("^$") in architecture and _anchored(pattern, architecture) for pattern in patterns):
            return task
    return "unknown"


def _anchored(pattern: str, text: str) -> bool:
    if pattern.startswith("^"):
        return text.startswith(pattern[1:])
    return not pattern.endswith("$") or text.endswith(pattern[:-1])


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method that already quantized the model, by its config; `gptq_v2` is GPTQ's layout whose zeros are stored as they are.

    MLX names no method: its section says only `bits` and `group_size`.
    """
    section = quantization_section(config)
    if not section:
        return None
    method = section.get("quant_method") or section.get("quant_type")
    if method is None:
        return "mlx" if "quantization" in config and {"bits", "group_size"} <= set(section) else "unknown"
    if method == "gptq" and "gptq_v2" in (section.get("checkpoint_format"), section.get("format")):
        return "gptq_v2"
    return str(method)


def quantization_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that says how the weights are stored; empty where they are floating point."""
    section = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    return section if isinstance(section, dict) else {}


def kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes that one token adds to the key-value cache at 16 bits; None where there is no such cache or it cannot be told."""
    blocks, heads, hidden = (number(config, key) for key in ("blocks", "heads", "hidden"))
    if blocks is None:
        return None
    if latent := whole(config.get("kv_lora_rank")):
        return 2 * blocks * (latent + (whole(config.get("qk_rope_head_dim")) or 0))
    if heads is None or not heads or hidden is None:
        return None
    head_dim = whole(config.get("head_dim")) or hidden // heads
    kv_heads = number(config, "kv_heads") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1
    return 2 * 2 * blocks * kv_heads * head_dim


def experts_of(config: Mapping[str, Any]) -> int | None:
    """How many experts a block has; None where it has none."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for key in keys if (count := whole(config.get(key)))), None)


def is_tied(config: Mapping[str, Any], text: Mapping[str, Any], layers: Iterable[LayerShape]) -> bool:
    """What the config says; where it says nothing, a language model without a head uses its embedding."""
    says = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return says if isinstance(says, bool) else not any(layer.kind == "head" for layer in layers)


def number(config: Mapping[str, Any], key: str) -> int | None:
    """One of `_ALIASES`, under whichever name the config has it."""
    return next((number for name in _ALIASES[key] if (number := whole(config.get(name))) is not None), None)


def whole(value: object) -> int | None:
    """`value` if it is a size, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
