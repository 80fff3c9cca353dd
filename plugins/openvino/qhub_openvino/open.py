"""Opening an IR: the file read and checked, what only a session wants added, compiled for a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qhub import OpenOptions, QhubError, Unsupported
from qhub_openvino.decoder import LAST
from qhub_openvino.devices import device_of, settings
from qhub_openvino.export import DATA, MODEL
from qhub_openvino.vendor import ops, ov

LOGITS_FROM = "logits_from"  # the first token whose logits are wanted: 0 for all, −1 for the last one only
_NO_STATES = ("NPU",)
_END = np.iinfo(np.int64).max


def read_ir(path: Path) -> tuple[ov.Core, ov.Model]:
    """The IR in the folder `path`, its weights mapped.

    :raises Unsupported: when there is none. :raises QhubError: when OpenVINO does not take it.
    """
    if not (path / MODEL).exists():
        raise Unsupported(f"`{path}` has no {MODEL}", hint="`qhub run MODEL --plugin openvino` makes such a folder")
    core = ov.Core()
    try:
        return core, core.read_model(path / MODEL)
    except RuntimeError as error:
        missing = "" if (path / DATA).exists() else f"; `{DATA}` is missing"
        raise QhubError(f"OpenVINO does not open `{path / MODEL}`{missing}: {reason(error)}", hint="export the model again") from None


def compile_decoder(path: Path, options: OpenOptions) -> ov.CompiledModel:
    """The decoder in the folder `path`, with one more input: `logits_from` (1).

    :raises Unsupported: on a device that has no states. :raises QhubError: when OpenVINO does not take the files.
    """
    core, model = read_ir(path)
    device = device_of(core, options)
    if device in _NO_STATES:
        raise Unsupported(f"language models run on the {device} by openvino-genai only, which opens this folder", hint="`--kernel CPU`")
    try:
        _add_logits_from(model)
        return core.compile_model(model, device, settings(device, options, (path / DATA).stat().st_size))
    except (RuntimeError, StopIteration) as error:
        raise QhubError(f"OpenVINO does not compile `{path / MODEL}`: {reason(error)}", hint="export the model again") from None


def _add_logits_from(model: ov.Model) -> None:
    hidden = next(node for node in model.get_ops() if node.get_friendly_name() == LAST).output(0)
    readers = list(hidden.get_target_inputs())
    start = ops.parameter([1], ov.Type.i64, name=LOGITS_FROM)
    start.output(0).set_names({LOGITS_FROM})
    wanted = ops.slice(hidden, start, np.array([_END]), np.array([1]), np.array([1]))
    for reader in readers:
        reader.replace_source_output(wanted.output(0))
    model.add_parameters([start])
    model.validate_nodes_and_infer_types()


def reason(error: Exception) -> str:
    """What OpenVINO says went wrong, without where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return " ".join(lines)[:300]
