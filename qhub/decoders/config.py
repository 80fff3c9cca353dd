"""What a model's config.json says, as an engine builds a decoder from it: one description for every family that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qhub.decoders.rope import Table, rope_table
from qhub.errors import Unsupported

#: config.json's `model_type` → what the family does differently from Llama. Source: transformers' modeling files.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_norms": True},
    "gemma2": {"gemma": True},
    "gemma3_text": {"gemma": True, "head_norms": True},
    "phi3": {"fused": True},
}
MOST_LAYERS, MOST_DIM = 10_000, 65_536
_ELSEWHERE = "`--runtime hf` opens it with transformers"
_GATES = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder: sizes, the constants of its formulas, and what each layer sees.

    `kind` is config.json's `model_type`.
    `windows` (layers): positions that a layer's queries see, 0 for all. `ropes` (layers): which of `tables` it turns by.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    ffn: int
    vocabulary: int
    context: int
    eps: float
    gate: int
    attention_scale: float
    tables: tuple[Table, ...]
    ropes: tuple[int, ...]
    windows: tuple[int, ...]
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj are one layer each in the files
    gemma: bool = False  # norms multiply by 1 + weight, and stand after attention and mlp too
    head_norms: bool = False
    stops: tuple[int, ...] = field(default=())


def decoder_config(config: Mapping[str, Any], engine: str) -> DecoderConfig:
    """The description of the model whose config.json is `config`, for `engine`, which errors name.

    :raises Unsupported: when the family, its activation or its rope scaling is not known here.
    :raises ValueError: when a size is not possible; a missing one is a KeyError.
    """
    kind = str(config.get("model_type"))
    if kind not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise Unsupported(f"`{engine}` does not run `{kind}` models; it runs {known}", hint=_ELSEWHERE)
    traits = _FAMILIES[kind]
    hidden, heads, layers = int(config["hidden_size"]), int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    dim = int(config.get("head_dim") or hidden // heads)
    _check_sizes(layers, dim)
    context = int(config["max_position_embeddings"])
    windows = _windows(config, layers)
    tables, ropes = _ropes(config, windows, (dim, context), engine)
    return DecoderConfig(
        kind=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        dim=dim,
        ffn=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        context=context,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        gate=_gate(config, engine),
        attention_scale=float(config.get("query_pre_attn_scalar") or dim) ** -0.5,
        tables=tables,
        ropes=ropes,
        windows=windows,
        embedding_scale=math.sqrt(hidden) if traits.get("gemma") else 1.0,
        attention_softcap=float(config.get("attn_logit_softcapping") or 0.0),
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
        tied=bool(config.get("tie_word_embeddings", traits.get("gemma", False))),
        fused=bool(traits.get("fused")),
        gemma=bool(traits.get("gemma")),
        head_norms=bool(traits.get("head_norms")),
        stops=_stops(config),
    )


def _check_sizes(layers: int, dim: int) -> None:
    """Refuse what no model has, before anything is allocated for it."""
    if not 0 < layers <= MOST_LAYERS or not 0 < dim <= MOST_DIM:
        message = f"{layers} layers with heads of {dim}"
        raise ValueError(message)


def _gate(config: Mapping[str, Any], engine: str) -> int:
    name = str(config.get("hidden_activation") or config.get("hidden_act") or "silu")
    if name not in _GATES:
        raise Unsupported(f"`{engine}` does not know activation `{name}`", hint=_ELSEWHERE)
    return _GATES[name]


def _stops(config: Mapping[str, Any]) -> tuple[int, ...]:
    stop = config.get("eos_token_id")
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not window or config.get("use_sliding_window") is False:
        return (0,) * layers
    if config["model_type"] == "gemma2":
        return tuple(0 if index % 2 else window for index in range(layers))
    if config["model_type"] == "gemma3_text":
        every = int(config.get("sliding_window_pattern", 6))
        return tuple(window if (index + 1) % every else 0 for index in range(layers))
    if config["model_type"].startswith("qwen"):
        return tuple(window if index >= int(config.get("max_window_layers", layers)) else 0 for index in range(layers))
    return (window,) * layers


def _ropes(
    config: Mapping[str, Any], windows: tuple[int, ...], sizes: tuple[int, int], engine: str
) -> tuple[tuple[Table, ...], tuple[int, ...]]:
    """Tables of frequencies, and which of them each layer uses: Gemma 3 has one for windows and one for all positions."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and "full_attention" in parameters:  # transformers 5, Gemma 3
        kinds = (parameters["full_attention"], parameters["sliding_attention"])
        return tuple(rope_table(_defaults(config, kind), *sizes, engine) for kind in kinds), tuple(int(window > 0) for window in windows)
    whole = _defaults(config, parameters or config.get("rope_scaling") or {})
    if "rope_local_base_freq" in config:  # transformers 4, Gemma 3
        local = {"rope_theta": config["rope_local_base_freq"]}
        return (rope_table(whole, *sizes, engine), rope_table(local, *sizes, engine)), tuple(int(window > 0) for window in windows)
    return (rope_table(whole, *sizes, engine),), (0,) * len(windows)


def _defaults(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with what older configs keep outside them."""
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    return {**{name: config[name] for name in outside if config.get(name) is not None}, **parameters}
