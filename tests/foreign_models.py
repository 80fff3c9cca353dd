"""Tiny models as other tools write them, and what their files say by formulas that share nothing with qhub's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import quantize, tiny_model

from qhub import Quantizer, quantize_rtn
from qhub.quantize.layouts.writer import write_layout

Tensors = dict[str, torch.Tensor]


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


def run_model(out: Path, scheme: str, family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: str) -> Path:
    """A QuantizedModel as a run leaves it; `overrides` are by the end of the layers' names."""
    quantize(tiny_model(family, dtype), out, Nearest(), scheme, overrides=overrides)
    return out / "model"


def foreign(source: Path, out: Path, layout: str) -> Path:
    """`source` in `layout`, in one file and without anything of qhub's own, as somebody else would have left it."""
    if layout == "compressed-tensors":
        shutil.copytree(source, out)
    else:
        out.mkdir()
        write_layout(source, out, layout)
    (out / "qhub.json").unlink()
    tensors: Tensors = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (out / "model.safetensors.index.json").unlink()
    save_file(tensors, out / "model.safetensors")
    return out


def edit_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a model in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_section(folder: Path, **changes: object) -> None:
    """Change the `quantization_config`; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    section = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in section.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def reorder(folder: Path, seed: int = 0) -> None:
    """Give every GPTQ layer an order of columns: groups of the same size, their columns anywhere."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]

    edit_tensors(folder, change)
    edit_section(folder, desc_act=True)


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """The first `count` codes of a dense bit stream of 32-bit words, by the arithmetic of one big number."""
    number = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(number >> (bits * index)) & (2**bits - 1) for index in range(count)]


def gptq_weight(tensors: Tensors, name: str, bits: int, *, version: int) -> np.ndarray:
    """W (N, K) float32 of a GPTQ layer."""
    words, zero_words = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales, groups = tensors[f"{name}.scales"].float().numpy(), tensors[f"{name}.g_idx"].numpy()
    outputs, inputs = words.shape[1], len(groups)
    codes = np.array([stream(words[:, n].tolist(), bits, inputs) for n in range(outputs)])
    zeros = np.array([stream(row.tolist(), bits, outputs) for row in zero_words]) + (1 if version == 1 else 0)
    return ((codes - zeros[groups].T) * scales[groups].T).astype(np.float32)


def awq_weight(tensors: Tensors, name: str) -> np.ndarray:
    """W (N, K) float32 of an AWQ layer: AutoAWQ's kernel takes the nibbles of a word for outputs 0, 2, 4, 6, 1, 3, 5, 7."""

    def unpacked(words: torch.Tensor) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for column in range(words.shape[1]):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, 8 * column + output] = (words[:, column].numpy().astype(np.int64) >> (4 * nibble)) & 15
        return out

    codes, zeros = unpacked(tensors[f"{name}.qweight"]), unpacked(tensors[f"{name}.qzeros"])
    scales = tensors[f"{name}.scales"].float().numpy()
    size = len(codes) // len(zeros)
    return ((codes - zeros.repeat(size, 0)) * scales.repeat(size, 0)).T.astype(np.float32)


def float_model(folder: Path, out: Path, weight_of: Callable[[Tensors, str], np.ndarray], ending: str = ".qweight") -> Path:
    """The float model that a packed one stands for, restored by `weight_of`."""
    tensors = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    restored = {name: torch.from_numpy(np.ascontiguousarray(weight_of(tensors, name))) for name in layers}
    kept = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers and not _is_part(name, layers)}
    out.mkdir()
    save_file({**kept, **{f"{name}.weight": weight for name, weight in restored.items()}}, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    return out


def _is_part(name: str, layers: list[str]) -> bool:
    return name.rpartition(".")[0] in layers and not name.endswith(".bias")
