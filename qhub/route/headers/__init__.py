"""Model files of one piece → `ModelProfile`, from their headers alone: ONNX, PT2, GGUF, TFLite."""

from __future__ import annotations

from pathlib import Path

from qhub.errors import UsageError
from qhub.route.config import SUFFIXES
from qhub.types import ModelProfile
from qhub.weights import PICKLES, pickle_refused


def profile_file(path: Path) -> ModelProfile:
    """Profile a model that is one file; what it is, its suffix says.

    :raises QhubError: when it is a pickle (with the way to convert it), broken, or of no known format.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise pickle_refused(path)
    if suffix == ".gguf":
        from qhub.route.headers.gguf_profile import profile_gguf as read
    elif suffix == ".onnx":
        from qhub.route.headers.onnx import profile_onnx as read
    elif suffix == ".tflite":
        from qhub.route.headers.tflite import profile_tflite as read
    elif suffix == ".pt2":
        from qhub.route.headers.pt2 import profile_pt2 as read
    else:
        known = ", ".join(f"`{name}`" for name in SUFFIXES)
        raise UsageError(
            f"`{path}` is a file; a model is a folder with config.json, or a file of {known}", hint=f"give its folder: `{path.parent}`"
        )
    return read(path)
