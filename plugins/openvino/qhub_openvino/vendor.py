"""OpenVINO, imported without its telemetry.

`import openvino` counts itself in `~/intel` and reports to Google Analytics if its package `openvino_telemetry` can be
imported; NNCF likewise. Both do without it, so here it cannot be imported; a process that has imported it before us is left
as it is.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402 - after what it must not find
from openvino import opset15 as ops  # noqa: E402

__all__ = ["ops", "ov"]
