"""compressed-tensors `pack-quantized`, qhub's own layout (`qhub/quantize/store.py` describes it), as others write it too.

Beyond what qhub writes, llm-compressor's models may have
    X.weight_g_idx int32 (K,): the group of each input, where GPTQ ordered the columns (`actorder` group, until 0.20)
    X.weight_zero_point int8 (N, G), less 2**(bits−1), not packed
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qhub.quantize.layouts.base import FLOATS, LayerFacts, Layout, ModelFacts, PackedFolder, StoredLayer, in_order
from qhub.quantize.store import Placement, has_plain_zeros, layer_tensors, quantization_config, read_layer
from qhub.types import Scheme

_FORMAT = "pack-quantized"
_G_IDX = ".weight_g_idx"


class CompressedTensorsLayout(Layout):
    """Weights packed into int32, activations float."""

    name = "compressed-tensors"
    codes = ".weight_packed"
    others = (".weight_scale", ".weight_shape", ".weight_zero_point", _G_IDX)

    def claims(self, section: Mapping[str, Any]) -> bool:
        """`quant_method` compressed-tensors."""
        return section.get("quant_method") == "compressed-tensors"

    def facts(self, source: PackedFolder, name: str) -> LayerFacts:
        """Headers and config of layer `name`, and the two numbers of its `weight_shape`."""
        said = _settings(source, name)
        bits = source.number("num_bits", said.get("num_bits"))
        source.check(f"{name}.weight_shape", ("I64", "I32"), (2,))
        first, second = source.read(f"{name}.weight_shape").tolist()
        if not 2 <= bits <= 8 or min(first, second) < 1:
            raise source.damaged(f"layer `{name}` has {bits} bits and the shape {[first, second]}")
        source.check(f"{name}.weight_packed", ("I32",), (first, -(-second * bits // 32)))
        found = self._placed(source, name, said, (first, second))
        scales = (found.groups, found.rows) if found.turned else (found.rows, found.groups)
        source.check(f"{name}.weight_scale", FLOATS, scales)
        if not found.scheme.symmetric:
            _check_zeros(source, name, bits, scales)
        if f"{name}{_G_IDX}" in source.files:
            source.check(f"{name}{_G_IDX}", ("I32", "I64"), (found.columns,))
        return found

    def _placed(self, source: PackedFolder, name: str, said: Mapping[str, Any], shape: tuple[int, int]) -> LayerFacts:
        """The layer's scheme by where its scales lie; `shape` is that of the stored matrix."""
        strategy, block = said.get("strategy"), said.get("block_structure")
        turned = strategy == "tensor" or (strategy == "block" and isinstance(block, list) and block[1:] == [1])
        rows, columns = reversed(shape) if turned else shape
        if strategy in ("channel", "tensor"):
            group_size = columns
        elif strategy == "block" and isinstance(block, list) and 1 in block:
            group_size = source.number("block_structure", block[0] if turned else block[1])
        elif strategy == "group":
            group_size = source.number("group_size", said.get("group_size"))
        else:
            raise source.unsupported(f"the scales of layer `{name}` are placed by strategy `{strategy}`")
        if group_size < 1 or columns % group_size:
            raise source.damaged(f"groups of {group_size} do not divide the {columns} inputs of layer `{name}`")
        one_group = strategy != "group" and group_size == columns
        scheme = Scheme(said["num_bits"], 16, None if one_group else group_size, bool(said.get("symmetric", True)))
        return LayerFacts(scheme, rows, columns, turned)

    def read(self, source: PackedFolder, name: str, facts: LayerFacts) -> StoredLayer:
        """Layer `name`; `weight_g_idx` is undone where the groups are consecutive after all."""
        found = read_layer(source.read, name, facts.scheme, transposed=facts.turned)
        stored = StoredLayer(found.codes, found.scale, found.zero, facts.scheme, _groups(source, name, facts))
        return in_order(stored, facts.group_size)

    def refuse(self, model: ModelFacts) -> str | None:
        """Groups that do not fill the inputs."""
        for name, facts in model.layers.items():
            if facts.columns % facts.group_size:
                return f"groups of {facts.group_size} do not divide the {facts.columns} inputs of layer `{name}`"
        return None

    def refuse_numbers(self, layer: StoredLayer) -> str | None:
        """An order of columns, which compressed-tensors 0.20 took out; scales are written in a dtype that holds them."""
        if layer.groups is not None:
            return "compressed-tensors has no `g_idx` since 0.20, and the columns of {} are ordered by activation (`desc_act`)"
        return None

    def tensors(self, name: str, layer: StoredLayer, model: ModelFacts) -> dict[str, torch.Tensor]:
        """The tensors of layer `name`; scales in the model's dtype where that is exact, else in fp16 or float32."""
        plain = has_plain_zeros(facts.scheme for facts in model.layers.values())
        dtype = next(one for one in (model.dtype, torch.float16, torch.float32) if torch.equal(layer.scale.to(one).float(), layer.scale))
        return layer_tensors(name, layer.tensor(), dtype, transposed=name in model.transposed, plain_zeros=plain)

    def section_of(self, model: ModelFacts) -> dict[str, Any]:
        """As `qhub run` writes it."""
        schemes = {name: facts.scheme for name, facts in model.layers.items()}
        plain = has_plain_zeros(schemes.values())
        places = {
            name: Placement.of(facts.scheme, facts.columns, transposed=name in model.transposed, plain_zeros=plain)
            for name, facts in model.layers.items()
        }
        return quantization_config(schemes, list(model.kept), places, expand=model.expand)


def _groups(source: PackedFolder, name: str, facts: LayerFacts) -> torch.Tensor | None:
    if f"{name}{_G_IDX}" not in source.files:
        return None
    groups = source.read(f"{name}{_G_IDX}").long()
    if int(groups.min()) < 0 or int(groups.max()) >= facts.groups:
        raise source.damaged(f"`weight_g_idx` of layer `{name}` names group {int(groups.max())} of {facts.groups}")
    return groups


def _check_zeros(source: PackedFolder, name: str, bits: int, scales: tuple[int, int]) -> None:
    """Zero points are int8 in the shape of the scales, or packed along the outputs."""
    zeros = f"{name}.weight_zero_point"
    if source.info(zeros).dtype == "I8":
        source.check(zeros, ("I8",), scales)
    else:
        source.check(zeros, ("I32",), (-(-scales[0] * bits // 32), scales[1]))


def _settings(source: PackedFolder, name: str) -> Mapping[str, Any]:
    """The `weights` of the config group that means layer `name`: by its name, by a pattern, else by its class.

    :raises Unsupported: when the model does more than rounding weights.
    """
    groups = source.section.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    ranked = sorted(((_rank(source, name, group), place) for place, group in enumerate(found)), key=lambda pair: pair[0])
    if not ranked or ranked[0][0] > 2:
        raise source.damaged(f"no group of its `config_groups` means layer `{name}`")
    group = found[ranked[0][1]]
    how = group.get("format") or source.section.get("format")
    if how != _FORMAT:
        raise source.unsupported(f"its weights are stored as `{how}`; read are those stored as `{_FORMAT}`")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise source.unsupported(f"it also rounds activations (`{key}`), which is not done here")
    if source.section.get("transform_config"):
        raise source.unsupported("its `transform_config` turns activations as it runs, which is not done here")
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        raise source.unsupported(f"the weights of layer `{name}` are no integers")
    return weights


def _rank(source: PackedFolder, name: str, group: Mapping[str, Any]) -> int:
    """How a group means a layer: 0 by its name, 1 by a pattern, 2 by its class, 3 not at all."""
    targets = [str(target) for target in group.get("targets") or ()]
    if name in targets:
        return 0
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    try:
        if any(re.match(pattern, name) for pattern in patterns):
            return 1
    except re.error:
        raise source.damaged(f"a target of its `config_groups` is no regular expression: `{patterns}`") from None
    return 2 if any("." not in target and not target.startswith("re:") for target in targets) else 3
