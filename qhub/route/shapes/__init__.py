"""A config without weights → the tensors that the model's checkpoint has, for the families whose shapes follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from qhub.errors import DamagedModelError
from qhub.route.shapes.decoders import DECODERS
from qhub.route.shapes.encoders import ENCODERS
from qhub.route.shapes.parts import Config, NotDerivable, Shapes
from qhub.route.shapes.unet import unet
from qhub.route.shapes.vision import TIMM, VISION
from qhub.weights import ITEM_BYTES, TensorInfo

MAX_TENSORS = 200_000
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_FAMILIES: Mapping[str, Callable[[Config], Shapes]] = {**DECODERS, **ENCODERS, **VISION}


def tensors_of(config: Mapping[str, Any], architecture: str, folder: Path) -> dict[str, TensorInfo] | None:
    """The tensors of the checkpoint that belongs to `config`; None where they do not follow from it.

    Numbers are stored as the config says, else in float32, as transformers and diffusers have it.

    :raises DamagedModelError: when the config holds sizes that no model has.
    """
    family = _family(config, architecture)
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))
    if family is None or dtype is None:
        return None
    try:
        shapes = dict(islice(family(Config({**config, "architecture": architecture})), MAX_TENSORS + 1))
    except NotDerivable:
        return None
    if len(shapes) > MAX_TENSORS:
        raise DamagedModelError(f"`{folder / 'config.json'}` means more than `{MAX_TENSORS}` tensors", hint="download it again")
    return {name: _tensor(name, shape, dtype, folder) for name, shape in shapes.items()}


def _family(config: Mapping[str, Any], architecture: str) -> Callable[[Config], Shapes] | None:
    if config.get("_class_name") == "UNet2DConditionModel":
        return unet
    if architecture in TIMM and "architectures" not in config:
        return TIMM[architecture]
    kind = config.get("model_type")
    return _FAMILIES.get(kind) if isinstance(kind, str) else None


def _tensor(name: str, shape: tuple[int, ...], dtype: str, folder: Path) -> TensorInfo:
    stored = "I64" if name.endswith("num_batches_tracked") else dtype
    return TensorInfo(name, stored, shape, folder / "config.json", 0, prod(shape) * ITEM_BYTES[stored])
