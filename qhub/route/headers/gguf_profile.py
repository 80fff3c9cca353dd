"""A GGUF header → `ModelProfile`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qhub.route.headers.gguf import Gguf, GgufTensor, Value, read_gguf
from qhub.route.layers import block_of
from qhub.types import LayerShape, ModelProfile, Task

_FLOATS = ("fp64", "fp32", "fp16", "bf16")
_EMBEDDERS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "gemma-embedding")
_TASKS: dict[str, Task] = {**dict.fromkeys(_EMBEDDERS, "embedding"), "t5": "nlp", "t5encoder": "nlp", "clip": "vision"}
_TASKS |= dict.fromkeys(("flux", "sd1", "sdxl", "sd3"), "generative")


@dataclass(frozen=True, slots=True)
class _Facts:
    """Metadata of one architecture."""

    gguf: Gguf
    architecture: str

    def of(self, key: str) -> Value | None:
        """The value of `<architecture>.<key>`."""
        return self.gguf.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> int | None:
        """The same, if it is a whole number."""
        value = self.of(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def profile_gguf(path: Path) -> ModelProfile:
    """Profile a GGUF model."""
    gguf = read_gguf(path)
    architecture = gguf.metadata.get("general.architecture")
    facts = _Facts(gguf, architecture if isinstance(architecture, str) else "unknown")
    layers = tuple(_layer(tensor) for tensor in gguf.tensors)
    tokens = gguf.metadata.get("tokenizer.ggml.tokens#")
    task = _task(facts)
    tied = task == "llm" and not any(layer.kind == "head" for layer in layers)
    blocks = facts.number("block_count")
    return ModelProfile(
        source=path.name,
        path=str(path),
        task=task,
        architecture=facts.architecture,
        parameters=sum(prod(layer.shape) for layer in layers),
        dtype=_dtype(layers),
        weight_bytes=sum(layer.bytes for layer in layers),
        layers=layers,
        blocks=blocks,
        hidden_size=facts.number("embedding_length"),
        kv_bytes_per_token=_kv_bytes_per_token(facts, blocks) if task == "llm" else None,
        vocabulary=facts.number("vocab_size") or (tokens if isinstance(tokens, int) else None),
        context_length=facts.number("context_length"),
        has_tokenizer=isinstance(tokens, int) and tokens > 0,
        tied_embeddings=tied,
        quantization=None if _dtype(layers) in (*_FLOATS, "unknown") else f"gguf {_dtype(layers)}",
        experts=facts.number("expert_count") or None,
        experts_per_token=facts.number("expert_used_count") or None,
        format="gguf",
    )


def _layer(tensor: GgufTensor) -> LayerShape:
    return LayerShape(tensor.name, _kind(tensor), tensor.shape, tensor.dtype, tensor.bytes, block_of(tensor.name))


def _kind(tensor: GgufTensor) -> str:
    name = tensor.name.rpartition(".")[0] or tensor.name
    if len(tensor.shape) < 2:
        return "norm" if name.endswith("norm") else "other"
    if name.startswith(("token_embd", "position_embd", "token_types")) or name.endswith("rel_b"):
        return "embedding"
    if name in ("output", "cls", "cls.output"):
        return "head"
    if name.endswith("_exps") or name.endswith("_shexp"):
        return "expert"
    if len(tensor.shape) > 2:
        return "conv"
    inside = block_of(tensor.name) is not None and not name.endswith(("_inp", "_inp_shexp"))
    return "linear" if inside else "other"


def _task(facts: _Facts) -> Task:
    """By the architecture; a language model is one that attends with a vocabulary to predict from."""
    if facts.architecture in _TASKS:
        return _TASKS[facts.architecture]
    if facts.of("attention.causal") is False or facts.of("pooling_type") is not None:
        return "embedding"
    names = {tensor.name for tensor in facts.gguf.tensors}
    speaks = "token_embd.weight" in names and facts.gguf.metadata.get("tokenizer.ggml.model") is not None
    return "llm" if speaks and facts.number("block_count") else "unknown"


def _dtype(layers: tuple[LayerShape, ...]) -> str:
    """The number format of most bytes in the blocks, else in the model."""
    inside = [layer for layer in layers if layer.kind in ("linear", "expert")] or list(layers)
    sizes: Counter[str] = Counter()
    for layer in inside:
        sizes[layer.dtype] += layer.bytes
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def _kv_bytes_per_token(facts: _Facts, blocks: int | None) -> int | None:
    heads, hidden = facts.number("attention.head_count"), facts.number("embedding_length")
    if blocks is None:
        return None
    if latent := facts.number("attention.kv_lora_rank"):
        return 2 * blocks * (latent + (facts.number("rope.dimension_count") or 0))
    keys = facts.number("attention.key_length") or (hidden // heads if heads and hidden else None)
    values = facts.number("attention.value_length") or keys
    of_blocks = facts.of("attention.head_count_kv")
    total = sum(of_blocks) if isinstance(of_blocks, tuple) else None
    if total is None:
        each = of_blocks if isinstance(of_blocks, int) else heads
        total = None if each is None else each * blocks
    return None if keys is None or values is None or total is None else 2 * total * (keys + values)
