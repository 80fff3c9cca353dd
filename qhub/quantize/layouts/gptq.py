"""GPTQ, as GPTQModel and AutoGPTQ write it. Source: GPTQModel `utils/model.py`, `nn_modules/qlinear/__init__.py`.

A layer X of W (N, K), b bits, G groups along K; codes are a dense bit stream, first element lowest:
    X.qweight int32 (K·b/32, N), packed along K · X.qzeros int32 (G, N·b/32), packed along N · X.scales fp16 (G, N)
    X.g_idx int32 (K,), the group of each input: k // group_size unless the columns were ordered by activation (`desc_act`)
    W[n, k] = (code − zero) · scale;  v1 stores zero − 1, v2 stores zero
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from qhub.quantize.layouts.base import (
    FLOATS,
    LayerFacts,
    Layout,
    ModelFacts,
    PackedFolder,
    StoredLayer,
    float_patterns,
    in_order,
    inexact_in_fp16,
)
from qhub.quantize.pack import pack, unpack
from qhub.types import Scheme

BITS = (2, 3, 4, 8)
_MULTIPLE = 32  # of K and N: whole words at every number of bits
#: One in every code of a word, as int32: what v1 words lack. GPTQModel adds it to whole words, so that a carry is undone.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GptqLayout(Layout):
    """Both versions; they differ in the zeros and in the config."""

    version: ClassVar[int]
    codes = ".qweight"
    others = (".qzeros", ".scales", ".g_idx")

    def claims(self, section: Mapping[str, Any]) -> bool:
        """`quant_method` gptq with this version's `checkpoint_format`; none means v1."""
        return section.get("quant_method") == "gptq" and _format_of(section) == self.name

    def facts(self, source: PackedFolder, name: str) -> LayerFacts:
        """Headers and config of layer `name`."""
        said = _settings(source, name)
        bits, group_size = source.number("bits", said.get("bits")), source.number("group_size", said.get("group_size", 128))
        if bits not in BITS:
            raise source.unsupported(f"its layer `{name}` has {bits} bits; GPTQ files are read at {', '.join(map(str, BITS))}")
        if said.get("pack_dtype", "int32") != "int32":
            raise source.unsupported(f"its codes are packed into `{said['pack_dtype']}`; read are those in `int32`")
        shape = source.info(f"{name}.qweight").shape
        if len(shape) != 2 or shape[0] * 32 % bits or group_size == 0 or group_size < -1:
            raise source.damaged(f"layer `{name}` of {bits} bits in groups of {group_size} has `qweight` {list(shape)}")
        columns, rows = shape[0] * 32 // bits, shape[1]
        found = LayerFacts(Scheme(bits, 16, None if group_size < 0 else group_size, bool(said.get("sym", True))), rows, columns)
        source.check(f"{name}.qweight", ("I32",), shape)
        source.check(f"{name}.qzeros", ("I32",), (found.groups, -(-rows * bits // 32)))
        source.check(f"{name}.scales", FLOATS, (found.groups, rows))
        if f"{name}.g_idx" in source.files:
            source.check(f"{name}.g_idx", ("I32", "I64"), (columns,))
        elif said.get("desc_act"):
            raise source.damaged(f"its columns are in another order (`desc_act`), but layer `{name}` has no `g_idx`")
        return found

    def read(self, source: PackedFolder, name: str, facts: LayerFacts) -> StoredLayer:
        """Layer `name`; `g_idx` is undone where the groups are consecutive after all."""
        bits = facts.scheme.weight_bits
        codes = unpack(source.read(f"{name}.qweight").t().contiguous(), bits, facts.columns)
        scale = source.read(f"{name}.scales").float().t().contiguous()
        zero = self._zeros(source.read(f"{name}.qzeros"), bits, facts.rows)
        groups = torch.arange(facts.columns) // facts.group_size
        if f"{name}.g_idx" in source.files:
            groups = source.read(f"{name}.g_idx").long()
            if int(groups.min()) < 0 or int(groups.max()) >= facts.groups:
                raise source.damaged(f"`g_idx` of layer `{name}` names group {int(groups.max())} of {facts.groups}")
        return in_order(StoredLayer(codes, scale, zero, facts.scheme, groups), facts.group_size)

    def _zeros(self, words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
        """The zeros (N, G) float32 of stored words (G, N·b/32) int32."""
        if self.version == 1 and bits in _ONES:
            words = words + _ONES[bits]
        zero = unpack(words.contiguous(), bits, rows)
        if self.version == 1 and bits not in _ONES:
            zero = (zero + 1) & (2**bits - 1)
        return zero.t().float().contiguous()

    def refuse(self, model: ModelFacts) -> str | None:
        """Bits that no kernel has, and matrices that do not fill whole words."""
        for name, facts in model.layers.items():
            if facts.scheme.weight_bits not in BITS:
                return f"GPTQ files have {', '.join(map(str, BITS))} bits; layer `{name}` has {facts.scheme.weight_bits}"
            if facts.rows % _MULTIPLE or facts.columns % _MULTIPLE:
                return f"GPTQ needs multiples of {_MULTIPLE} inputs and outputs; layer `{name}` is {facts.rows} × {facts.columns}"
        return None

    def refuse_numbers(self, layer: StoredLayer) -> str | None:
        """v1 has no zero 0; scales are fp16."""
        if self.version == 1 and bool((layer.zero < 1).any()):
            return "GPTQ v1 stores zero − 1 and so has no zero of 0, which there is in {} (`gptq_v2` has)"
        return "GPTQ stores scales in fp16, which would round those of {}" if inexact_in_fp16(layer) else None

    def tensors(self, name: str, layer: StoredLayer, model: ModelFacts) -> dict[str, torch.Tensor]:
        """The four tensors of layer `name`."""
        bits, columns = layer.scheme.weight_bits, layer.codes.shape[1]
        groups = torch.arange(columns) // (layer.scheme.group_size or columns) if layer.groups is None else layer.groups
        zero = (layer.zero - 1 if self.version == 1 else layer.zero).to(torch.uint8)
        return {
            f"{name}.qweight": pack(layer.codes, bits).t().contiguous(),
            f"{name}.qzeros": pack(zero.t().contiguous(), bits),
            f"{name}.scales": layer.scale.t().half().contiguous(),
            f"{name}.g_idx": groups.to(torch.int32),
        }

    def section_of(self, model: ModelFacts) -> dict[str, Any]:
        """One scheme for all, and a `dynamic` entry for each layer that differs or stays float."""
        schemes = [facts.scheme for facts in model.layers.values()]
        common = max(sorted(set(schemes), key=str), key=schemes.count)
        different = {f"+:^{re.escape(name)}$": _said(facts.scheme) for name, facts in model.layers.items() if facts.scheme != common}
        return {
            "quant_method": "gptq",
            **_said(common),
            "desc_act": model.reordered,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "lm_head": "lm_head" in model.layers,
            "dynamic": {**different, **float_patterns(model.kept_inside)} or None,
            "true_sequential": True,
            "damp_percent": 0.05,
            "meta": {"quantizer": ["qhub:0.1"]},
        }


class GptqV1(GptqLayout):
    """Stores zero − 1, in words that may borrow from each other."""

    name = "gptq"
    version = 1


class GptqV2(GptqLayout):
    """Stores the zero."""

    name = "gptq_v2"
    version = 2


def _said(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.weight_bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def _format_of(section: Mapping[str, Any]) -> str:
    return str(section.get("checkpoint_format") or section.get("format") or "gptq")


def _settings(source: PackedFolder, name: str) -> Mapping[str, Any]:
    """The settings of layer `name`: the model's, or those of the first pattern of `dynamic` that matches."""
    dynamic = source.section.get("dynamic")
    if dynamic and not isinstance(dynamic, Mapping):
        raise source.damaged("`dynamic` of its quantization_config is no object")
    for pattern, said in (dynamic or {}).items():
        if not str(pattern).startswith("-:") and _matches(source, str(pattern).removeprefix("+:"), name):
            return {**source.section, **said}
    return source.section


def _matches(source: PackedFolder, pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        raise source.damaged(f"`{pattern}` in `dynamic` of its quantization_config is no regular expression") from None
