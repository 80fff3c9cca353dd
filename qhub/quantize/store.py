"""The QuantizedModel on disk: a Hugging Face folder in the compressed-tensors pack-quantized layout, and `qhub.json`.

One shard per decoder block, one for everything else, and an index: a block's file is final when the block is done, so a
run never holds or rewrites more than one block. Layout of a layer X (N, K), source compressed-tensors `pack_quantized`:
    X.weight_packed int32 (N, ceil(K·bits/32)) · X.weight_scale (N, G) in the model's dtype · X.weight_shape int64 (2,)
    X.weight_zero_point int32 (ceil(N·bits/32), G), only if asymmetric
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qhub.errors import QhubError
from qhub.quantize.pack import pack, unpack
from qhub.quantize.qtensor import QTensor
from qhub.skeleton import read_tensor, stored_dtype
from qhub.types import QuantizedModel, Scheme
from qhub.weights import INDEX, WeightFiles

METADATA = "qhub.json"
FORMAT_VERSION = 1
_CT_VERSION = "0.15.0"  # the oldest compressed-tensors whose layout this is
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json")


def layer_tensors(name: str, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The stored tensors of layer `name` (without `.weight`); `dtype` is the model's."""
    rows, columns = tensor.codes.shape
    stored = {
        f"{name}.weight_packed": pack(tensor.codes, tensor.bits),
        f"{name}.weight_scale": tensor.scale.to(dtype),
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not tensor.symmetric:
        zero = tensor.zero.to(torch.uint8).t().contiguous()
        stored[f"{name}.weight_zero_point"] = pack(zero, tensor.bits).t().contiguous()
    return stored


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file beside `path` and rename it into place, synced to disk."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - JSON
    """Write JSON beside `path` and rename it into place."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.rename(path)


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (0 is everything outside the blocks)."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def finish(folder: Path, source: Path, schemes: Mapping[str, Scheme], ignored: list[str], metadata: Mapping[str, Any]) -> None:
    """Write index, config and metadata once all shards are in `folder`, and copy the tokenizer from `source`."""
    files = WeightFiles.open_shards(folder, sorted(path.name for path in folder.glob("model-*.safetensors")))
    weight_map = {name: info.file.name for name, info in files.items()}
    total = sum(info.bytes for info in files.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(schemes, ignored)
    write_json(folder / "config.json", config)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / METADATA, {"format_version": FORMAT_VERSION, "kind": "weights", **metadata})


def quantization_config(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: layers (full names) by scheme; one group of `Linear` if there is one scheme."""
    by_scheme: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(str(scheme), []).append(name)
    groups = {}
    for index, (scheme_text, names) in enumerate(sorted(by_scheme.items())):
        targets = ["Linear"] if len(by_scheme) == 1 else sorted(names)
        groups[f"group_{index}"] = _config_group(Scheme.parse(scheme_text), targets)
    # transformers expands int4 weights anyway; packed zero points it can only read while it loads (compressed-tensors
    # 0.18 to 0.20 build an unpacked place for them otherwise). vLLM ignores the key.
    loading = {} if all(scheme.symmetric for scheme in schemes.values()) else {"dequantize": True}
    return {
        **loading,
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignored),
        "config_groups": groups,
        "version": _CT_VERSION,
        "sparsity_config": {},
        "transform_config": {},
    }


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {"targets": targets, "format": "pack-quantized", "input_activations": None, "output_activations": None, "weights": weights}


class QuantizedWeights:
    """The weights of a QuantizedModel under the float model's names: `X.weight` is there, dequantized when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = WeightFiles.open(folder)
        self.metadata = read_metadata(folder)
        self.schemes = {name: Scheme.parse(text) for name, text in self.metadata["layers"].items()}
        self.transposed = frozenset(self.metadata.get("transposed", ()))  # layers whose float files hold (K, N)

    def __iter__(self) -> Iterator[str]:
        parts = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
        yield from (name for name in self.files if not name.endswith(parts))
        yield from (f"{name}.weight" for name in self.schemes)

    def __contains__(self, name: object) -> bool:
        return name in self.files or (isinstance(name, str) and name.removesuffix(".weight") in self.schemes)

    def model_dtype(self) -> torch.dtype:
        """The dtype that scales and float tensors are stored in."""
        return stored_dtype(self.files)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`: as stored if float, else dequantized in the model's dtype, the way round that the float files have it."""
        if name in self.files:
            return read_tensor(self.files, name)
        layer = name.removesuffix(".weight")
        dtype = read_tensor(self.files, f"{layer}.weight_scale").dtype
        weight = self.layer(layer).dequantize(dtype)
        return weight.t() if layer in self.transposed else weight

    def layer(self, name: str) -> QTensor:
        """The QTensor of layer `name`, read back from its packed form."""
        scheme = self.schemes[name]
        rows, columns = read_tensor(self.files, f"{name}.weight_shape").tolist()
        codes = unpack(read_tensor(self.files, f"{name}.weight_packed"), scheme.weight_bits, columns)
        scale = read_tensor(self.files, f"{name}.weight_scale").float()
        if scheme.symmetric:
            zero = torch.full_like(scale, 2.0 ** (scheme.weight_bits - 1))
        else:
            packed = read_tensor(self.files, f"{name}.weight_zero_point").t().contiguous()
            zero = unpack(packed, scheme.weight_bits, rows).t().float().contiguous()
        return QTensor(codes, scale, zero, scheme.weight_bits, scheme.symmetric)

    def bytes_by_class(self) -> dict[str, int]:
        """Stored bytes of codes, scales and zeros, embeddings and head, and of what else stays float."""
        sizes = {"codes": 0, "scales_and_zeros": 0, "embedding_and_head": 0, "other_float": 0}
        for name, info in self.files.items():
            if name.endswith(".weight_packed"):
                sizes["codes"] += info.bytes
            elif name.endswith((".weight_scale", ".weight_zero_point", ".weight_shape")):
                sizes["scales_and_zeros"] += info.bytes
            else:
                sizes["embedding_and_head" if len(info.shape) == 2 else "other_float"] += info.bytes
        return sizes


def read_metadata(folder: Path) -> dict[str, Any]:
    """`qhub.json` of a QuantizedModel.

    :raises QhubError: when it is missing or not what this version writes.
    """
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except FileNotFoundError:
        raise QhubError(f"`{folder}` is not a model that qhub quantized: it has no {METADATA}", hint="`qhub run MODEL` makes one") from None
    except (ValueError, KeyError, TypeError):
        raise QhubError(f"`{path}` is damaged", hint="run `qhub run --resume` to write it again") from None
    if version != FORMAT_VERSION:
        raise QhubError(f"`{path}` has format version `{version}`, this qhub reads {FORMAT_VERSION}", hint="pip install -U qhub-core")
    return dict(metadata)


def open_model(folder: Path) -> QuantizedModel:
    """The QuantizedModel value of a folder that `finish` wrote."""
    metadata = read_metadata(folder)
    return QuantizedModel(folder, metadata["kind"], metadata["scheme"], metadata["method"])


def folder_digest(folder: Path) -> tuple[int, str]:
    """(bytes, sha256) of all files below `folder`: the digest over each file's relative name and digest."""
    total, digest = 0, hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inner = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                inner.update(chunk)
                total += len(chunk)
        digest.update(f"{path.relative_to(folder).as_posix()} {inner.hexdigest()}\n".encode())
    return total, digest.hexdigest()
