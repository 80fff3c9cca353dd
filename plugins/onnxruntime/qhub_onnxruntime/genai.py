"""`genai_config.json`, by which onnxruntime-genai opens the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub import DecoderConfig
from qhub_onnxruntime.graph import MODEL


def genai_config(config: DecoderConfig, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai wants to know of the graph; `stated` is the model's config.json."""
    stops = list(config.stops)
    first = stops[0] if stops else 0
    return {
        "model": {
            "type": config.kind,
            "vocab_size": config.vocabulary,
            "context_length": config.context,
            "bos_token_id": stated.get("bos_token_id") or first,
            "eos_token_id": stops if len(stops) > 1 else first,
            "pad_token_id": stated.get("pad_token_id") or first,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": config.dim,
                "hidden_size": config.hidden,
                "num_attention_heads": config.heads,
                "num_hidden_layers": config.layers,
                "num_key_value_heads": config.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
