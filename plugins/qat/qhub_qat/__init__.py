"""Quantization-aware training for networks that are graphs; `prepare`, `finish` and `save` are for training loops of one's own.

from qhub_qat import finish, prepare, save

prepared = prepare(model, {"x": images}, "w4a4-static")  # an nn.Module that is called as `model` is
...  # train `prepared.parameters()`
save(prepared, Path("quantized"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qhub_qat.api import finish, prepare, save

__all__ = ["finish", "prepare", "save"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562: torch is imported by whoever trains
    if name in __all__:
        return getattr(importlib.import_module("qhub_qat.api"), name)
    message = f"module `qhub_qat` has no attribute `{name}`"
    raise AttributeError(message)
