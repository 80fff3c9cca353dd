"""The QuantizedModel on disk: a Hugging Face folder in the compressed-tensors pack-quantized layout, and `qhub.json`.

One shard per decoder block, one for everything else, and an index: a block's file is final when the block is done, so a
run never holds or rewrites more than one block. Layout of a layer X (N, K), source compressed-tensors `pack_quantized`:
    X.weight_packed int32 (N, ceil(K·bits/32)) · X.weight_scale (N, G) in the model's dtype · X.weight_shape int64 (2,)
    X.weight_zero_point int32 (ceil(N·bits/32), G), only if asymmetric
Two cases that transformers can only read from blocks of scales (`Placement`); vLLM refuses those:
    asymmetric layers beside layers of another scheme: X.weight_zero_point int8 (N, G), less 2**(bits−1), not packed
    layers whose float files hold (K, N), as GPT-2's do: all of it transposed, packed along N; zero points as above (G, N)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json")


@dataclass(frozen=True)
class Placement:
    """Where a layer's scales lie: a compressed-tensors strategy, and for "block" how many rows and columns share one."""

    strategy: str
    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, scheme: Scheme, columns: int, *, transposed: bool, plain_zeros: bool) -> Placement:
        """The placement of a layer of K = `columns` inputs, stored as `layer_tensors` does with the same switches."""
        if transposed:  # one scale per column of (K, N): "tensor" is what compressed-tensors multiplies as it lies
            return cls("block", (scheme.group_size, 1)) if scheme.group_size else cls("tensor")
        if plain_zeros and not scheme.symmetric:
            return cls("block", (1, scheme.group_size or columns))
        return cls("group" if scheme.group_size else "channel")

    @property
    def is_transposed(self) -> bool:
        """Whether the layer is stored as (K, N)."""
        return self.strategy == "tensor" or (self.block is not None and self.block[1] == 1)


def has_plain_zeros(schemes: Iterable[Scheme]) -> bool:
    """Whether a model of these schemes stores zero points unpacked.

    transformers 5 reads packed ones only while it loads (`dequantize`), and takes every layer for one of the first scheme.
    """
    different = set(schemes)
    return len(different) > 1 and not all(scheme.symmetric for scheme in different)


def layer_tensors(
    name: str, tensor: QTensor, dtype: torch.dtype, *, transposed: bool = False, plain_zeros: bool = False
) -> dict[str, torch.Tensor]:
    """The stored tensors of layer `name` (without `.weight`); `dtype` is the model's."""
    codes, scale = (tensor.codes.t(), tensor.scale.t()) if transposed else (tensor.codes, tensor.scale)
    stored = {
        f"{name}.weight_packed": pack(codes.contiguous(), tensor.bits),
        f"{name}.weight_scale": scale.to(dtype).contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not tensor.symmetric:
        stored[f"{name}.weight_zero_point"] = _stored_zero(tensor, transposed=transposed, plain=plain_zeros)
    return stored


def _stored_zero(tensor: QTensor, *, transposed: bool, plain: bool) -> torch.Tensor:
    if transposed or plain:
        zero = (tensor.zero - (1 << (tensor.bits - 1))).to(torch.int8)
        return (zero.t() if transposed else zero).contiguous()
    return pack(tensor.zero.to(torch.uint8).t().contiguous(), tensor.bits).t().contiguous()


def read_layer(read: Callable[[str], torch.Tensor], name: str, scheme: Scheme, *, transposed: bool = False) -> QTensor:
    """Layer `name` from the tensors that `layer_tensors` made of it: `read` returns a stored one by its name."""
    bits = scheme.weight_bits
    rows, columns = read(f"{name}.weight_shape").tolist()
    codes = unpack(read(f"{name}.weight_packed"), bits, columns)
    scale = read(f"{name}.weight_scale").float()
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if scheme.symmetric else _zero(read(f"{name}.weight_zero_point"), bits, rows)
    if transposed:
        codes, scale, zero = (part.t().contiguous() for part in (codes, scale, zero))
    return QTensor(codes, scale, zero, bits, scheme.symmetric)


def _zero(stored: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    if stored.dtype == torch.int8:
        return stored.float() + (1 << (bits - 1))
    return unpack(stored.t().contiguous(), bits, rows).t().float().contiguous()


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file beside `path` and rename it into place, synced to disk."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - JSON
    """Write JSON beside `path` and rename it into place, synced to disk."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (0 is everything outside the blocks)."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path) -> WeightFiles:
    """Write the index of all shards in `folder`; returns what they hold."""
    files = WeightFiles.open_shards(folder, sorted(path.name for path in folder.glob("model-*.safetensors")))
    weight_map = {name: info.file.name for name, info in files.items()}
    total = sum(info.bytes for info in files.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def finish(folder: Path, source: Path, schemes: Mapping[str, Scheme], ignored: list[str], metadata: Mapping[str, Any]) -> None:
    """Write index, config and metadata once all shards are in `folder`, and copy the tokenizer from `source`."""
    files = write_index(folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    placements = _placements(files, schemes, metadata)
    config["quantization_config"] = quantization_config(schemes, ignored, placements, expand=bool(metadata.get("subclassed")))
    write_json(folder / "config.json", config)
    for pattern in COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / METADATA, {"format_version": FORMAT_VERSION, "kind": "weights", **metadata})


def _placements(files: WeightFiles, schemes: Mapping[str, Scheme], metadata: Mapping[str, Any]) -> dict[str, Placement]:
    """Where each layer's scales lie, by what the files hold."""
    transposed = frozenset(metadata.get("transposed", ()))
    found = {}
    for name, scheme in schemes.items():
        columns = int(read_tensor(files, f"{name}.weight_shape")[1])
        plain = not scheme.symmetric and files[f"{name}.weight_zero_point"].dtype == "I8"
        found[name] = Placement.of(scheme, columns, transposed=name in transposed, plain_zeros=plain)
    return found


def quantization_config(
    schemes: Mapping[str, Scheme], ignored: list[str], placements: Mapping[str, Placement] | None = None, *, expand: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json: layers (full names) by scheme; one group of `Linear` if there is one scheme.

    `expand` makes transformers expand the weights as it loads them; where it could not load them otherwise, it does so anyway.
    """
    alike: dict[tuple[str, Placement], list[str]] = {}
    for name, scheme in schemes.items():
        plain = Placement.of(scheme, 0, transposed=False, plain_zeros=False)
        alike.setdefault((str(scheme), (placements or {}).get(name, plain)), []).append(name)
    groups = {}
    for index, ((scheme_text, placement), names) in enumerate(sorted(alike.items(), key=str)):
        targets = ["Conv1D" if placement.is_transposed else "Linear"] if len(alike) == 1 else sorted(names)
        groups[f"group_{index}"] = _config_group(Scheme.parse(scheme_text), placement, targets)
    return {
        **({"dequantize": True} if expand or any(_must_expand(Scheme.parse(text), placement) for text, placement in alike) else {}),
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


def _must_expand(scheme: Scheme, placement: Placement) -> bool:
    """Whether transformers has to expand such layers as it loads them; later it does so anyway. vLLM ignores the key.

    It cannot hold packed zero points (compressed-tensors 0.18 to 0.20 build an unpacked place for them), in a Conv1D
    nothing packed at all, and the code of a model with linear layers of its own class (Falcon) asks them for their weight.
    """
    return placement.is_transposed or (placement.block is None and not scheme.symmetric)


def _config_group(scheme: Scheme, placement: Placement, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": placement.strategy,
        "group_size": scheme.group_size if placement.strategy == "group" else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None if placement.block is None else list(placement.block),
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {"targets": targets, "format": "pack-quantized", "input_activations": None, "output_activations": None, "weights": weights}


class QuantizedWeights:
    """The weights of a QuantizedModel under the float model's names: `X.weight` is there, dequantized when it is read.

    `dtype` is what they are dequantized in; None: the model's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.folder, self.dtype = folder, dtype
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
        """Tensor `name`: as stored if float, else dequantized, the way round that the float files have it."""
        if name in self.files:
            return read_tensor(self.files, name)
        layer = name.removesuffix(".weight")
        dtype = self.dtype or read_tensor(self.files, f"{layer}.weight_scale").dtype
        weight = self.layer(layer).dequantize(dtype)
        return weight.t().contiguous() if layer in self.transposed else weight

    def layer(self, name: str) -> QTensor:
        """The QTensor of layer `name`, read back from its packed form."""
        return read_layer(lambda part: read_tensor(self.files, part), name, self.schemes[name], transposed=name in self.transposed)

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
