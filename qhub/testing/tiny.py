"""The model that plugins are checked with: a random Llama of three blocks, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qhub.types import Scheme

if TYPE_CHECKING:
    import torch

VOCABULARY, BLOCKS = 128, 3


def write_model(folder: Path, scheme: Scheme, dtype: str) -> Path:
    """Write the model into `folder`, if it is not there, with layers wide enough for the groups of `scheme`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    width = max(128, scheme.group_size or 0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.get_input_embeddings().weight[:, ::11] *= 6  # some inputs matter more, as in real models
        odd = model.model.layers[0].mlp.down_proj.weight
        odd[0], odd[1] = 0, 0.25  # rows without a range, as real models have
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_ids(samples: int, seq_len: int) -> torch.Tensor:
    """Token ids (samples, seq_len) int64, the same every time."""
    import torch

    return torch.randint(3, VOCABULARY, (samples, seq_len), generator=torch.Generator().manual_seed(0))


def damage(model: Path, folder: Path) -> Path:
    """A copy of the model at `folder` with one NaN in its last block."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
