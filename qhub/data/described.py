"""How a model wants its pictures, from files: transformers' `preprocessor_config.json`, or our own `preprocess.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qhub.data.pictures import ImageSteps, Resize
from qhub.data.sounds import Waves
from qhub.errors import QhubError

NAMES = ("preprocess.json", "preprocess.yaml", "preprocess.yml")
#: Processors of transformers that do exactly the common steps; given one number as size, the second ones keep the sides' ratio.
_SQUARE = frozenset({"ViT", "DeiT", "Beit", "Siglip"})
_RATIO = frozenset({"Bit", "CLIP", "ConvNext", "MobileNetV1", "MobileNetV2"})
_UNCROPPED = frozenset({"ViT", "Siglip", "ConvNext"})
_KEYS = ("input", "layout", "size", "crop", "resample", "scale", "mean", "std", "channels", "dtype", "sampling_rate", "samples")
_CHANNELS = {"rgb": (3, False), "bgr": (3, True), "grey": (1, False), "gray": (1, False)}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    :raises QhubError: when it cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = _yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise QhubError(f"`{path}` cannot be read: {str(error).splitlines()[0]}", hint="write a JSON or YAML mapping") from None
    if not isinstance(value, dict):
        raise QhubError(f"`{path}` holds no mapping", hint='write for example {"layout": "nchw", "scale": 0.00392157}')
    return value


def common_steps(path: Path, data: Mapping[str, Any]) -> ImageSteps | None:
    """The steps of a `preprocessor_config.json`; None where only transformers knows them: steps of its own, or values left to defaults.

    :raises QhubError: when a value is not what its key allows.
    """
    kind = _processor(data)
    if kind not in _SQUARE | _RATIO or data.get("do_pad") or data.get("do_reduce_labels") or _left_to_defaults(data, kind):
        return None
    resize, crop = _resizing(path, data, kind), None
    if data.get("do_center_crop"):
        crop = _pair(path, "crop_size", data["crop_size"])
    if resize is not None and kind == "ConvNext":
        resize, crop = _convnext(resize, data, crop)
    normalise = data.get("do_normalize", True)
    return ImageSteps(
        resize=resize,
        crop=crop,
        scale=_number(path, "rescale_factor", data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 1.0,
        mean=_numbers(path, "image_mean", data["image_mean"]) if normalise else (),
        std=_numbers(path, "image_std", data["image_std"]) if normalise else (),
        reverse_channels=bool(data.get("do_flip_channel_order", False)),
    )


def own_steps(path: Path, data: Mapping[str, Any], name: str) -> ImageSteps | Waves:
    """The steps of a `preprocess.json`; `name` is the input's where the file says none.

    :raises QhubError: when a key is unknown or a value is not what it allows.
    """
    for key in data:
        if key not in _KEYS:
            raise QhubError(f"`{path}` has the unknown key `{key}`", hint=f"known: {', '.join(_KEYS)}")
    name = str(data.get("input", name))
    if "sampling_rate" in data:
        samples = data.get("samples")
        return Waves(name, _count(path, "sampling_rate", data["sampling_rate"]), samples and _count(path, "samples", samples))
    channels, reverse = _CHANNELS[_choice(path, "channels", data.get("channels", "rgb"), tuple(_CHANNELS))]
    resample = _RESAMPLE[_choice(path, "resample", data.get("resample", "bilinear"), tuple(_RESAMPLE))]
    return ImageSteps(
        name=name,
        layout=_choice(path, "layout", data.get("layout", "nchw"), ("nchw", "nhwc")),
        channels=channels,
        resize=Resize(size=_pair(path, "size", data["size"]), resample=resample) if data.get("size") else None,
        crop=_pair(path, "crop", data["crop"]) if data.get("crop") else None,
        scale=_number(path, "scale", data.get("scale", 1.0)),
        mean=_numbers(path, "mean", data.get("mean")),
        std=_numbers(path, "std", data.get("std")),
        reverse_channels=reverse,
        dtype=_choice(path, "dtype", data.get("dtype", "float32"), ("float32", "float16", "uint8", "int8", "int32", "int64")),
    )


def _processor(data: Mapping[str, Any]) -> str:
    name = str(data.get("image_processor_type") or data.get("feature_extractor_type") or "")
    for end in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(end)
    return name


def _left_to_defaults(data: Mapping[str, Any], kind: str) -> bool:
    """Whether a step is done with values that the file does not hold."""
    needed = {"do_resize": ("size", "resample"), "do_normalize": ("image_mean", "image_std")}
    missing = [key for step, keys in needed.items() if data.get(step, True) for key in keys if data.get(key) is None]
    cropped = data.get("do_center_crop", None if kind not in _UNCROPPED else False)
    return bool(missing) or cropped is None or (bool(cropped) and "crop_size" not in data)


def _resizing(path: Path, data: Mapping[str, Any], kind: str) -> Resize | None:
    if not data.get("do_resize", True):
        return None
    size, resample = data["size"], int(data["resample"])
    if isinstance(size, dict) and "shortest_edge" in size:
        longest = size.get("longest_edge")
        shortest = _count(path, "size", size["shortest_edge"])
        return Resize(shortest=shortest, longest=longest and _count(path, "size", longest), resample=resample)
    if isinstance(size, int) and kind in _RATIO:
        return Resize(shortest=_count(path, "size", size), resample=resample)
    return Resize(size=_pair(path, "size", size), resample=resample)


def _convnext(resize: Resize, data: Mapping[str, Any], crop: tuple[int, int] | None) -> tuple[Resize, tuple[int, int] | None]:
    """ConvNeXT's processor: below 384 the shorter side gets room for a crop, from there on both sides are stretched."""
    if resize.shortest is None:
        return resize, crop
    edge, square = resize.shortest, (resize.shortest, resize.shortest)
    if edge >= 384:
        return Resize(size=square, resample=resize.resample), crop
    share = data.get("crop_pct") or 224 / 256
    return Resize(shortest=int(edge / share), resample=resize.resample), square


def _pair(path: Path, key: str, value: object) -> tuple[int, int]:
    """(height, width) from a number, a pair or transformers' dictionary."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, list) or len(pair) != 2:
        raise _bad(path, key, value, "[height, width]")
    return _count(path, key, pair[0]), _count(path, key, pair[1])


def _count(path: Path, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(path, key, value, "a whole number from 1 up")
    return value


def _number(path: Path, key: str, value: object) -> float:
    """A number, also as a fraction such as `1/255`."""
    try:
        found = float(Fraction(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        raise _bad(path, key, value, "a number") from None
    if not np.isfinite(found):
        raise _bad(path, key, value, "a finite number")
    return found


def _numbers(path: Path, key: str, value: object) -> tuple[float, ...]:
    """One number per channel, or one for all; none for None. A deviation is not 0."""
    values: Sequence[object] = () if value is None else value if isinstance(value, list) else (value,)
    found = tuple(_number(path, key, each) for each in values)
    if len(found) not in (0, 1, 3) or (key.endswith("std") and 0.0 in found):
        raise _bad(path, key, value, "one number or three" + (", not 0" if key.endswith("std") else ""))
    return found


def _choice(path: Path, key: str, value: object, known: Sequence[str]) -> str:
    if value not in known:
        raise _bad(path, key, value, f"one of {', '.join(known)}")
    return str(value)


def _bad(path: Path, key: str, value: object, expected: str) -> QhubError:
    return QhubError(f"`{key}` in `{path}` is `{value}`, which is not {expected}", hint=f"write {expected} there")


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
