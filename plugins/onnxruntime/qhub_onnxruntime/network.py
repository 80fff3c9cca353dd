"""Networks that are no language models, as ONNX folders: `model.onnx` with quantize and dequantize, and what feeds the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qhub import ONNXRUNTIME, OnnxOptions, QhubError, Recipe, read_onnx_layers, write_onnx

if TYPE_CHECKING:
    from qhub import QTensor

MODEL, PROGRAM, METADATA = "model.onnx", "model.pt2", "qhub.json"


def export_network(source: Path, out: Path, recipe: Recipe) -> None:
    """Write the network of the QuantizedModel folder `source` into the empty folder `out`, with the files beside it.

    :raises QhubError: when the folder holds no network.
    """
    programs = (source / PROGRAM, source / MODEL)
    if not any(path.is_file() for path in programs):
        raise QhubError(f"`{source}` has neither `{PROGRAM}` nor `{MODEL}`", hint="quantize the model again with `qhub run`")
    weights = (PROGRAM, MODEL, f"{MODEL}.data") if programs[0].is_file() else (PROGRAM,)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*weights))
    if programs[0].is_file():
        write_onnx(programs[0], out / MODEL, OnnxOptions(ONNXRUNTIME, recipe_digest=_digest(source)))


def _digest(folder: Path) -> str:
    path = folder / METADATA
    said: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(said.get("recipe_digest") or "")


def model_file(path: Path) -> Path:
    """The ONNX file of an artifact, which may be the file itself."""
    return path / MODEL if path.is_dir() else path


def network_layers(path: Path) -> Mapping[str, QTensor]:
    """The codes, scales and zeros in a network's ONNX file."""
    return read_onnx_layers(model_file(path))
