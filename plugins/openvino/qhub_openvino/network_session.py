"""A network that is no language model, opened by OpenVINO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub import GraphInput, OpenOptions, QhubError, fitting_array
from qhub_openvino.devices import CPU, device_of, settings
from qhub_openvino.export import DATA, MODEL
from qhub_openvino.network import NETWORK, facts
from qhub_openvino.open import read_ir, reason
from qhub_openvino.vendor import ov

_SMALLEST = 32  # OpenVINO rounds no smaller groups


class NetworkSession:
    """The network in a folder; `inputs` and `outputs` are those of the file."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        core, model = read_ir(path)
        self._path = path / MODEL
        self.inputs = tuple(_described(item) for item in model.inputs)
        self.outputs = tuple(item.any_name for item in model.outputs)
        device = device_of(core, options)
        given = settings(device, options, (path / DATA).stat().st_size)
        if device == CPU and not options.exact:
            given |= _dynamic(facts(model, NETWORK))
        try:
            self._request: ov.InferRequest | None = core.compile_model(model, device, given).create_infer_request()
        except RuntimeError as error:
            raise QhubError(f"OpenVINO does not compile `{self._path}`: {reason(error)}", hint="export the model again") from None

    def run(self, batch: Mapping[str, NDArray[np.generic]]) -> tuple[NDArray[np.float32], ...]:
        """The outputs for one batch (input name → array, axis 0 the items).

        :raises QhubError: when an input is missing or has a shape that the network does not take.
        """
        assert self._request is not None, "closed"
        feeds = {item.name: fitting_array(self._path, item, batch) for item in self.inputs}
        try:
            made = self._request.infer(feeds, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise QhubError(f"OpenVINO does not run `{self._path}`: {reason(error)}", hint="export the model again") from None
        return tuple(made[name] for name in self.outputs)

    def close(self) -> None:
        """Give memory back."""
        self._request = None


def _dynamic(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Inputs that are rounded while the network runs, in the largest groups that all of those layers are made of."""
    size = math.gcd(*(said["inputs"] for said in layers.values() if said["dynamic"]))
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(size)} if size >= _SMALLEST else {}


def _described(item: ov.Output) -> GraphInput:
    shape = tuple(size.get_length() if size.is_static else -1 for size in item.partial_shape)
    return GraphInput(item.any_name, shape, np.dtype(item.element_type.to_dtype()).name)
