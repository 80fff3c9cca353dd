"""Tensors of a model folder → `LayerShape`s: what each weight is, and its true shape where it is stored packed.

Everything is decided from names, shapes and the config, not from a table of architectures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from qhub.route.config import quantization_section, whole
from qhub.types import LayerShape
from qhub.weights import TensorInfo

#: safetensors' names of number formats → ours, which are also scheme names where there is one.
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_BUFFERS = (
    "inv_freq", "position_ids", "masked_bias", "num_batches_tracked", "running_mean", "running_var", "e_score_correction_bias", ".SCB",
    ".weight_format",
)  # fmt: skip
_MASKS = ("attn.bias", "attention.bias")
_EMBEDDINGS = {"wte", "wpe", "shared", "relative_attention_bias", "position_bias_table"}
_HEADS = {"lm_head", "embed_out", "head", "heads", "classifier", "score", "fc", "cls", "output", "qa_outputs", "output_projection"}
_PACKED = (".weight_packed", ".qweight")
_PACKING = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".qzeros", ".scales", ".biases", ".g_idx")
#: bitsandbytes stores the state of each weight under the weight's own name.
_STATE = ".weight."


def layer_shapes(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """One entry per weight, in the order of the blocks; a matrix stored (K, N), as in GPT-2, is turned to (N, K)."""
    turned = _stored_transposed(tensors)
    layers = [_layer(info, tensors, config, turned) for info in tensors.values() if _is_weight(info)]
    return tuple(sorted(layers, key=lambda layer: (-1 if layer.block is None else layer.block, layer.name)))


def block_of(name: str) -> int | None:
    """The index of the block that `name` belongs to: the first number in it, unless that counts the layers of a head."""
    parts = name.split(".")
    place = _place_of_number(parts)
    return None if place is None else int(parts[place])


def _place_of_number(parts: list[str]) -> int | None:
    for place, part in enumerate(parts[:-1]):
        if part in _HEADS:
            return None
        if part.isdecimal() and part.isascii() and len(part) < 10:
            return place
    return None


def main_dtype(layers: Iterable[LayerShape]) -> str:
    """The number format of most bytes."""
    sizes: Counter[str] = Counter()
    for layer in layers:
        sizes[layer.dtype] += layer.bytes
    return sizes.most_common(1)[0][0] if sizes else "unknown"


def block_names(names: Iterable[str]) -> set[str]:
    """The blocks as dotted names, e.g. `model.layers.0`; an encoder and a decoder are told apart."""
    found = set()
    for name in names:
        parts = name.split(".")
        place = _place_of_number(parts)
        if place is not None:
            found.add(".".join(parts[: place + 1]))
    return found


def _is_weight(info: TensorInfo) -> bool:
    if info.name.endswith(_BUFFERS) or _STATE in info.name or (len(info.shape) > 2 and info.name.endswith(_MASKS)):
        return False
    return not info.name.endswith(_PACKING)


def _layer(info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], turned: bool) -> LayerShape:
    shape, size_bytes, name = info.shape, info.bytes, info.name
    block = block_of(name)
    if name.endswith(_PACKED):
        base = name.rpartition(".")[0]
        shape, name = _unpacked(info, tensors, config), f"{base}.weight"
        size_bytes += sum(tensors[base + suffix].bytes for suffix in _PACKING if base + suffix in tensors)
    elif name.endswith(".weight") and info.dtype in ("U32", "U8"):
        shape, size_bytes = _packed_in_place(info, tensors, config)
    kind = _kind(name, shape, block, config)
    if turned and kind == "linear" and _may_be_turned(info, tensors):
        shape = (shape[1], shape[0])
    return LayerShape(name, kind, shape, DTYPES.get(info.dtype, info.dtype.lower()), size_bytes, block)


def _kind(name: str, shape: tuple[int, ...], block: int | None, config: Mapping[str, Any]) -> str:
    parts = set(name.split(".")[:-1])
    if len(shape) < 2 or not name.endswith("weight"):
        if len(shape) >= 2 and "expert" in name:  # fused experts are parameters, not modules
            return "expert"
        return "norm" if len(shape) < 2 and _is_norm(parts) else "other"
    if len(shape) > 2:
        return "expert" if "expert" in name else "conv"
    last = name.rpartition(".")[0].rpartition(".")[2]
    if ("embed" in last or last in _EMBEDDINGS) and not parts & _HEADS:
        return "embedding"
    if block is None:
        return "head" if parts & _HEADS or shape[0] == config.get("vocab_size") else "other"
    if any(part.endswith(("gate", "router")) for part in parts) and shape[0] in _expert_counts(config):
        return "other"  # it chooses experts, and stays float
    return "expert" if "expert" in name else "linear"


def _is_norm(parts: set[str]) -> bool:
    return any("norm" in part.lower() or part.startswith(("ln", "bn")) for part in parts)


def _expert_counts(config: Mapping[str, Any]) -> set[Any]:
    """Rows that a router can have: one per expert, or one for the shared expert."""
    return {whole(config.get(key)) for key in ("num_local_experts", "num_experts", "n_routed_experts")} - {None} | {1}


def _stored_transposed(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether block matrices are stored (K, N): their biases then have the length of the last axis, not of the first."""
    straight = turned = 0
    for info in tensors.values():
        if len(info.shape) != 2 or info.shape[0] == info.shape[1] or not info.name.endswith(".weight") or block_of(info.name) is None:
            continue
        bias = tensors.get(info.name.removesuffix("weight") + "bias")
        if bias is not None and len(bias.shape) == 1:
            straight += bias.shape[0] == info.shape[0]
            turned += bias.shape[0] == info.shape[1]
    return turned > straight


def _may_be_turned(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    bias = tensors.get(info.name.removesuffix("weight") + "bias")
    return bias is not None and bias.shape == info.shape[1:]


def _unpacked(info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The (N, K) that a packed int32 matrix stands for.

    compressed-tensors packs along K: (N, K / f); GPTQ (K / f, N); AWQ (K, N / f), with f = 32 // bits numbers in each int32.
    """
    quantization = quantization_section(config)
    base = info.name.rpartition(".")[0]
    weights = _weights_of(quantization, base)
    bits = whole(weights.get("num_bits", quantization.get("bits", quantization.get("w_bit"))))
    if len(info.shape) != 2 or bits is None or not 0 < bits <= 16:
        return info.shape
    first, second = info.shape
    if info.name.endswith(".weight_packed"):
        return _compressed(info.shape, tensors.get(f"{base}.weight_scale"), weights, bits)
    if quantization.get("quant_method") == "awq":
        return (second * 32 // bits, first)
    return (second, first * 32 // bits)


def _packed_in_place(info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """(true shape, bytes) of a matrix that is packed under its own name, by MLX (uint32, along K) or bitsandbytes (uint8, flat)."""
    base = info.name.removesuffix(".weight")
    scales = tensors.get(f"{base}.scales")
    if info.dtype == "U32" and scales is not None and len(info.shape) > 1:
        section = quantization_section(config)
        own = section.get(base)
        bits = whole((own if isinstance(own, dict) else section).get("bits")) or 0
        more = sum(tensors[base + suffix].bytes for suffix in (".scales", ".biases") if base + suffix in tensors)
        shape = (*info.shape[:-1], info.shape[-1] * 32 // bits) if 0 < bits <= 16 else info.shape
        return shape, info.bytes + more
    if info.dtype == "U8" and info.shape[1:] == (1,) and f"{info.name}.absmax" in tensors:
        state = sum(other.bytes for name, other in tensors.items() if name.startswith(f"{info.name}."))
        return _unflattened(info, config), info.bytes + state
    return info.shape, info.bytes


def _unflattened(info: TensorInfo, config: Mapping[str, Any]) -> tuple[int, ...]:
    """(N, K) of two numbers a byte: as the config has it, where it says so; else only how many there are."""
    from qhub.route.shapes import tensors_of

    names = config.get("architectures")
    derived = tensors_of(config, str(names[0]), info.file.parent) if isinstance(names, list) and names else None
    expected = (derived or {}).get(info.name)
    count = 2 * info.shape[0]
    return expected.shape if expected is not None and prod(expected.shape) == count else (count, 1)


def _compressed(packed: tuple[int, ...], scale: TensorInfo | None, weights: Mapping[str, Any], bits: int) -> tuple[int, ...]:
    """(N, K) of a layer of compressed-tensors, by its scales, one for each group of K; `block_structure` counts rows and columns."""
    first, second = packed
    block = _block_structure(weights)
    if scale is not None and len(scale.shape) == 2:
        if weights.get("strategy") == "tensor" or (block and block[1] == 1):  # qhub's way to store a Conv1D: (K, N)
            return (scale.shape[1], first)
        group_size = block[1] if block else weights.get("group_size")
        if isinstance(group_size, int) and group_size > 0:
            return (first, scale.shape[1] * group_size)
    return (first, second * 32 // bits)


def _block_structure(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of the blocks that share a scale, where a layer has such."""
    block = weights.get("block_structure")
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = map(whole, block)
    return None if rows is None or columns is None else (rows, columns)


def _weights_of(quantization: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """How the weights of `layer` are stored: by the group that names it, else by the first one."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping):
        return {}
    found = [group for group in groups.values() if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)]
    naming = [group for group in found if isinstance(group.get("targets"), list) and layer in group["targets"]]
    return next((group["weights"] for group in (*naming, *found)), {})
