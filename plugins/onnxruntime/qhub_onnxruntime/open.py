"""Opening a graph: threads, execution providers, and the precision that activations are rounded to."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime

from qhub import OpenOptions, QhubError, Unsupported, fast_cores
from qhub_onnxruntime.decoder import LOGITS_FROM
from qhub_onnxruntime.graph import DATA, MODEL
from qhub_onnxruntime.linear import ACCURACY
from qhub_onnxruntime.providers import providers

FLOAT_LEVEL = 1  # float32 in `accuracy_level`
_MOST_TEXT = 300
_FOLDER = "session.model_external_initializers_file_folder_path"


def open_graph(path: Path, options: OpenOptions) -> onnxruntime.InferenceSession:
    """The graph in the folder `path`; exact: `MatMulNBits` multiplies in float32.

    :raises Unsupported: when a kernel is asked for. :raises QhubError: when ONNX Runtime does not take the files.
    """
    if options.kernel is not None:
        raise Unsupported(f"`onnxruntime` has no kernel `{options.kernel}`: it chooses its own", hint="leave out `--kernel`")
    if not (path / MODEL).exists():
        raise Unsupported(f"`{path}` has no {MODEL}", hint="`qhub run MODEL --plugin onnxruntime` makes such a folder")
    settings = _settings(options)
    settings.add_session_config_entry(_FOLDER, str(path.resolve()))
    try:
        return onnxruntime.InferenceSession(_prepared(path / MODEL, exact=options.exact), settings, providers())
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a class per status, protobuf its own
        raise _refused(path, error) from None


def _settings(options: OpenOptions) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or fast_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # what goes wrong is raised
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = FLOAT_LEVEL if options.exact else ACCURACY
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))  # of what it makes of DequantizeLinear
    return settings


def _prepared(path: Path, *, exact: bool) -> bytes:
    """The graph without the default of `logits_from`, as only an input without one can be bound; exact: nothing is rounded."""
    model = onnx.load_model(path, load_external_data=False)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != LOGITS_FROM]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node if exact else ():
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = FLOAT_LEVEL
    return bytes(model.SerializeToString())


def _refused(path: Path, error: Exception) -> QhubError:
    missing = "" if (path / DATA).exists() else f"; `{DATA}` is missing"
    text = " ".join(str(error).split())
    said = text if len(text) <= _MOST_TEXT else f"… {text[-_MOST_TEXT:]}"  # it begins with where in its sources
    return QhubError(f"ONNX Runtime does not open `{path / MODEL}`{missing}: {said}", hint="export the model again")
