"""Opens any model folder that can be read: float, quantized by qhub, or quantized by somebody else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qhub.errors import DamagedModelError, QhubError, Unsupported
from qhub.quantize.layouts.awq import AwqLayout
from qhub.quantize.layouts.base import LayerFacts, Layout, PackedFolder, StoredLayer
from qhub.quantize.layouts.compressed_tensors import CompressedTensorsLayout
from qhub.quantize.layouts.gptq import GptqV1, GptqV2
from qhub.quantize.observe import is_transposed
from qhub.quantize.store import METADATA, QuantizedWeights, read_metadata
from qhub.skeleton import FloatWeights, Skeleton, Weights, read_tensor, stored_dtype
from qhub.types import Scheme
from qhub.weights import WeightFiles

#: Every layout by the name that users write.
LAYOUTS: Mapping[str, Layout] = {one.name: one for one in (CompressedTensorsLayout(), AwqLayout(), GptqV1(), GptqV2())}
#: Where tools wrote their settings before config.json had a place for them, and what they are when the file does not say it.
_OLD_SETTINGS = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))


class PackedWeights:
    """A model with quantized layers under the float model's names: `X.weight` is there, dequantized when it is read."""

    def __init__(self, folder: Path, section: Mapping[str, Any]) -> None:
        """Open `folder`, whose `quantization_config` is `section`; checks every header.

        :raises Unsupported: when it is stored in a way that is not read. :raises DamagedModelError: when it contradicts itself.
        """
        self.folder = folder
        self.files = WeightFiles.open(folder)
        self.source = PackedFolder(folder, self.files, section)
        self.layout = _layout_of(self.source)
        self.metadata = read_metadata(folder) if (folder / METADATA).exists() else {}
        names = [name.removesuffix(self.layout.codes) for name in self.files if name.endswith(self.layout.codes)]
        if not names:
            raise self.source.unsupported(f"its config says `{section.get('quant_method')}`, but it has no `{self.layout.codes}` tensors")
        self.layers = {name: self._facts(name) for name in names}
        self._parts = {f"{name}{part}" for name in names for part in (self.layout.codes, *self.layout.others)}

    def _facts(self, name: str) -> LayerFacts:
        """Headers and config of layer `name`; what qhub wrote down of it is more exact where a layout cannot say it."""
        facts, said = self.layout.facts(self.source, name), self.metadata.get("layers", {}).get(name)
        return facts if said is None else replace(facts, scheme=Scheme.parse(said))

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Layers whose float files hold (K, N); such layers always have a bias."""
        if self.layout.codes == ".weight_packed" or "transposed" in self.metadata:
            return frozenset(self.metadata.get("transposed", ())) | {name for name, facts in self.layers.items() if facts.turned}
        if not any(f"{name}.bias" in self.files for name in self.layers):
            return frozenset()
        skeleton = Skeleton(self)
        turned = (f"{name}.weight" for name, module in skeleton.model.named_modules() if is_transposed(module))
        return frozenset(skeleton.stored_name(name).removesuffix(".weight") for name in turned) & self.layers.keys()

    def float_names(self) -> list[str]:
        """The tensors that are no part of a quantized layer."""
        return [name for name in self.files if name not in self._parts]

    def __iter__(self) -> Iterator[str]:
        yield from self.float_names()
        yield from (f"{name}.weight" for name in self.layers)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and ((name in self.files and name not in self._parts) or name.removesuffix(".weight") in self.layers)

    def model_dtype(self) -> torch.dtype:
        """The dtype that the float matrices are stored in; that of the scales where there are none."""
        return self._dtype

    @cached_property
    def _dtype(self) -> torch.dtype:
        plain = {name: self.files[name] for name in self.float_names()}
        matrices = any(len(info.shape) == 2 for info in plain.values())
        return stored_dtype(WeightFiles(self.folder, plain) if matrices else self.files)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`: as stored if float, else dequantized in the model's dtype, the way round that the float files have it."""
        if name in self.files:
            return read_tensor(self.files, name)
        layer = name.removesuffix(".weight")
        weight = self.layer(layer).dequantize().to(self.model_dtype())
        return weight.t().contiguous() if layer in self.transposed else weight

    def layer(self, name: str) -> StoredLayer:
        """Layer `name` as it is stored."""
        return self.layout.read(self.source, name, self.layers[name])


def open_weights(folder: Path) -> Weights:
    """The weights of any model folder.

    :raises QhubError: when it cannot be read, with the reason.
    """
    section = quantization_section(folder)
    if section is None:
        return FloatWeights(folder)
    if section.get("quant_method") == CompressedTensorsLayout.name and (folder / METADATA).exists():
        return QuantizedWeights(folder)
    return PackedWeights(folder, section)


def open_packed(folder: Path) -> PackedWeights:
    """The quantized layers of a folder, whoever wrote it.

    :raises QhubError: when it is a float model, or none at all.
    """
    section = quantization_section(folder)
    if section is None and not (folder / "config.json").exists():
        raise QhubError(
            f"`{folder}` is not a model folder: it has no config.json", hint="a model folder holds config.json and *.safetensors"
        )
    if section is None:
        raise QhubError(f"`{folder}` is a float model", hint=f"`qhub run {folder}` quantizes it")
    return PackedWeights(folder, section)


def quantization_section(folder: Path) -> Mapping[str, Any] | None:
    """What a folder's config says of its quantization; None for a float model.

    :raises QhubError: when the file is no JSON object.
    """
    config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
    section = config.get("quantization_config") or config.get("compression_config")
    if isinstance(section, Mapping):
        return section
    for file, method in _OLD_SETTINGS:
        if (folder / file).exists():
            return {"quant_method": method, **_json(folder / file)}
    return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DamagedModelError(f"`{path}` is not JSON", hint="get it again") from None
    if not isinstance(found, Mapping):
        raise DamagedModelError(f"`{path}` is no JSON object", hint="get it again")
    return found


def _layout_of(source: PackedFolder) -> Layout:
    section = source.section
    for layout in LAYOUTS.values():
        if layout.claims(section):
            return layout
    method = section.get("quant_method", "unknown")
    how = f"`{method}` in format `{section.get('checkpoint_format') or section.get('format')}`" if method == "gptq" else f"`{method}`"
    raise Unsupported(f"`{source.folder}` is quantized by {how}, which is not read here", hint=f"read are {', '.join(LAYOUTS)}")
