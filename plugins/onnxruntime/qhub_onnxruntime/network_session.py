"""A network that is no language model, opened by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qhub import GraphInput, OpenOptions, QhubError, Unsupported, fast_cores, fitting_array
from qhub_onnxruntime.network import model_file

#: What is used where the installed package has it, best first.
_PROVIDERS = ("CUDAExecutionProvider", "DmlExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider")
_DTYPES = {"float": "float32", "double": "float64", "float16": "float16"}


class NetworkSession:
    """The network in a folder or file; `inputs` and `outputs` are those of the file."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        """Open it with `options.threads` threads (None: the fast cores); exact: what lies between pairs is computed in float32."""
        if options.kernel is not None:
            raise Unsupported(f"`onnxruntime` has no kernel `{options.kernel}`: it chooses its own", hint="leave out `--kernel`")
        self._path = model_file(path)
        self._session: Any = _opened(self._path, _settings(options))
        self.inputs = tuple(_described(item) for item in self._session.get_inputs())
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def run(self, batch: Mapping[str, NDArray[np.generic]]) -> tuple[NDArray[np.float32], ...]:
        """The outputs for one batch (input name → array, axis 0 the items).

        :raises QhubError: when an input is missing or has a shape that the network does not take.
        """
        feed = {item.name: fitting_array(self._path, item, batch) for item in self.inputs}
        try:
            made: list[NDArray[np.float32]] = self._session.run(None, feed)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a class per status
            raise _failed(self._path, "run", error) from None
        return tuple(made)

    def close(self) -> None:
        """Give memory back."""
        self._session = None


def _settings(options: OpenOptions) -> Any:  # noqa: ANN401 - ONNX Runtime has no types
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or fast_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # what goes wrong is raised
    if options.exact:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return settings


def _opened(path: Path, settings: Any) -> Any:  # noqa: ANN401 - ONNX Runtime has no types
    if not path.is_file():
        raise Unsupported(f"`{path}` does not exist", hint="`qhub run MODEL --plugin onnxruntime` makes such a folder")
    available = set(onnxruntime.get_available_providers())
    try:
        return onnxruntime.InferenceSession(path, settings, [name for name in _PROVIDERS if name in available])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a class per status, protobuf its own
        raise _failed(path, "open", error) from None


def _failed(path: Path, what: str, error: Exception) -> QhubError:
    text = " ".join(str(error).split())
    said = text if len(text) <= 300 else f"… {text[-300:]}"  # it begins with where in its sources
    return QhubError(f"ONNX Runtime does not {what} `{path}`: {said}", hint="export the model again")


def _described(item: Any) -> GraphInput:  # noqa: ANN401 - ONNX Runtime has no types
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    return GraphInput(item.name, tuple(size if isinstance(size, int) else -1 for size in item.shape), _DTYPES.get(kind, kind))
