"""`.pt2` archives are opened only if nothing in them can run code: `torch.export.load` unpickles what an archive asks it to."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch

from qhub.errors import QhubError

#: Constants that torch unpickles as objects of any kind, and compiled code.
_OBJECTS = ("custom_obj_", "opaque_obj_")
_COMPILED = "data/aotinductor/"


def refuse_code(path: Path) -> None:
    """Look through an archive before it is loaded.

    :raises QhubError: naming the member, when it holds compiled code or a pickle of more than tensors.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if inner.startswith(_COMPILED) or Path(name).name.startswith(_OBJECTS):
                raise _refused(path, name)
            if name.endswith("_config.json") and '"use_pickle": true' in json.dumps(json.loads(archive.read(name))):
                raise _refused(path, name)
            if name.endswith(".pt") and not _only_tensors(archive.read(name)):
                raise _refused(path, name)


def _only_tensors(data: bytes) -> bool:
    """Whether a pickle is one of tensors and plain containers; empty ones are read as nothing."""
    if not data:
        return True
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever is in it, it is refused
        return False
    return True


def _refused(path: Path, name: str) -> QhubError:
    message = f"`{path}` holds `{name}`, which can run code when it is loaded"
    return QhubError(message, hint="save the program again with torch.export.save from plain tensors, or give an .onnx file")
