"""A Llama's Hugging Face folder as a GGUF file in bfloat16: what `llama-quantize` starts from.

    python to_gguf.py HF_FOLDER OUT.gguf

For the folders of `make_llama.py`: one or more safetensors files, a BPE tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
SPECIAL_TOKENS = 3


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{PARTS[part]}.weight"


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in the order of ggml's rotary embedding: halves of a head become pairs."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(GGUF name, tensor) of everything in the folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                if "q_proj" in name or "k_proj" in name:
                    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                    tensor = interleaved(tensor, heads)
                yield gguf_name(name), tensor


def add_header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Sizes and constants."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], folder: Path) -> None:
    """Vocabulary and, if the tokenizer has any, merges."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds[index >= SPECIAL_TOKENS] for index in range(len(words))])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", ())])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def main() -> None:
    """Read the arguments; write the file."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    add_header(writer, config)
    add_tokenizer(writer, config, folder)
    for name, tensor in tensors(folder, config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
