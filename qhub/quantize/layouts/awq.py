"""AWQ in the GEMM version, as AutoAWQ writes it. Source: AutoAWQ `utils/packing_utils.py`, `modules/linear/gemm.py`.

A layer X of W (N, K), 4 bits, G groups along K; a word holds eight consecutive outputs:
    X.qweight int32 (K, N/8) · X.qzeros int32 (G, N/8) · X.scales fp16 (G, N)
    bits 4i … 4i+3 of word c hold output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];  W[n, k] = (code − zero) · scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qhub.quantize.layouts.base import FLOATS, LayerFacts, Layout, ModelFacts, PackedFolder, StoredLayer, float_patterns, inexact_in_fp16
from qhub.quantize.pack import pack, unpack
from qhub.types import Scheme

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, lowest bits first
_NATURAL = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each output is


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """codes (R, N) uint8, 0 … 15 → int32 (R, N/8)."""
    rows, outputs = codes.shape
    return pack(codes.reshape(rows, outputs // 8, 8)[:, :, _ORDER].reshape(rows, outputs), 4)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 (R, N/8) → codes (R, N) uint8."""
    rows, count = words.shape
    return unpack(words, 4, count * 8).reshape(rows, count, 8)[:, :, _NATURAL].reshape(rows, count * 8)


class AwqLayout(Layout):
    """4 bits, asymmetric; symmetric layers are carried with a zero of 8 everywhere."""

    name = "awq"
    codes = ".qweight"
    others = (".qzeros", ".scales")

    def claims(self, section: Mapping[str, Any]) -> bool:
        """`quant_method` awq."""
        return section.get("quant_method") == "awq"

    def facts(self, source: PackedFolder, name: str) -> LayerFacts:
        """Headers and config of layer `name`."""
        section = source.section
        version = str(section.get("version") or section.get("format") or "gemm").lower()
        if version != "gemm":
            raise source.unsupported(f"it is stored in version `{version}` of AWQ; read is `gemm`")
        bits = source.number("bits", section.get("bits", section.get("w_bit")))
        group_size = source.number("group_size", section.get("group_size", section.get("q_group_size", 128)))
        if bits != 4:
            raise source.unsupported(f"its layers have {bits} bits; AWQ's GEMM version has 4")
        shape = source.info(f"{name}.qweight").shape
        if len(shape) != 2 or group_size == 0 or group_size < -1:
            raise source.damaged(f"layer `{name}` in groups of {group_size} has `qweight` {list(shape)}")
        columns, rows = shape[0], shape[1] * 8
        found = LayerFacts(Scheme(4, 16, None if group_size < 0 else group_size, symmetric=False), rows, columns)
        if columns % found.group_size:
            raise source.damaged(f"groups of {group_size} do not divide the {columns} inputs of layer `{name}`")
        source.check(f"{name}.qweight", ("I32",), shape)
        source.check(f"{name}.qzeros", ("I32",), (found.groups, rows // 8))
        source.check(f"{name}.scales", FLOATS, (found.groups, rows))
        return found

    def read(self, source: PackedFolder, name: str, facts: LayerFacts) -> StoredLayer:
        """Layer `name`."""
        codes = unpack_awq(source.read(f"{name}.qweight")).t().contiguous()
        zero = unpack_awq(source.read(f"{name}.qzeros")).t().float().contiguous()
        return StoredLayer(codes, source.read(f"{name}.scales").float().t().contiguous(), zero, facts.scheme)

    def refuse(self, model: ModelFacts) -> str | None:
        """Anything but 4 bits in groups of one size, outputs in whole words."""
        sizes = sorted({facts.scheme.group_size or -1 for facts in model.layers.values()})
        for name, facts in model.layers.items():
            if facts.scheme.weight_bits != 4:
                return f"AWQ has 4 bits; layer `{name}` has {facts.scheme.weight_bits}"
            if facts.rows % 8 or facts.columns % facts.group_size:
                return f"AWQ packs 8 outputs into a word and needs whole groups; layer `{name}` is {facts.rows} × {facts.columns}"
        return f"AWQ has one group size; these layers have {', '.join(map(str, sizes))} (-1: per output)" if len(sizes) > 1 else None

    def refuse_numbers(self, layer: StoredLayer) -> str | None:
        """It has no order of columns; scales are fp16."""
        if layer.groups is not None:
            return "AWQ has no `g_idx`: groups of consecutive inputs only, and the columns of {} are ordered by activation (`desc_act`)"
        return "AWQ stores scales in fp16, which would round those of {}" if inexact_in_fp16(layer) else None

    def tensors(self, name: str, layer: StoredLayer, model: ModelFacts) -> dict[str, torch.Tensor]:
        """The three tensors of layer `name`."""
        return {
            f"{name}.qweight": pack_awq(layer.codes.t().contiguous()),
            f"{name}.qzeros": pack_awq(layer.zero.t().to(torch.uint8).contiguous()),
            f"{name}.scales": layer.scale.t().half().contiguous(),
        }

    def section_of(self, model: ModelFacts) -> dict[str, Any]:
        """One group size; float layers inside the blocks by name, for AutoAWQ's readers and for GPTQModel."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": next(iter(model.layers.values())).scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(model.kept) if model.kept_inside else None,
            **({"dynamic": float_patterns(model.kept_inside)} if model.kept_inside else {}),
        }
