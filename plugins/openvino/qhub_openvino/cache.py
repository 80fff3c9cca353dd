"""Keys and values of a sequence: the states of one of OpenVINO's requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qhub import QhubError
from qhub_openvino.decoder import BEAMS, LOGITS
from qhub_openvino.open import LOGITS_FROM
from qhub_openvino.vendor import ov


class Cache:
    """Room for `capacity` tokens of one sequence."""

    def __init__(self, compiled: ov.CompiledModel, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._request = compiled.create_infer_request()

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append ids (1, T); the logits (V) float32 after the last of them, valid until the next step.

        :raises QhubError: when there is no room for them.
        """
        total = self.length + ids.shape[1]
        if total > self.capacity:
            message = f"`{ids.shape[1]}` tokens do not fit: `{self.length}` of {self.capacity} are kept"
            raise QhubError(message, hint="shorten the prompt, or begin again")
        logits = run(self._request, ids, self.length, last=True)
        self.length = total
        return logits[0, -1]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length >= self.length:
            return
        if length == 0:
            self._request.reset_state()
        else:
            for state in self._request.query_state():
                state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self.length = length


def run(request: ov.InferRequest, ids: NDArray[np.int64], past: int, *, last: bool) -> NDArray[np.float32]:
    """Logits (B, T, V) after ids (B, T) that follow `past` others; `last`: (B, 1, V) of the last token. Valid until the next call."""
    count, length = ids.shape
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((count, past + length), dtype=np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (count, 1)),
        BEAMS: np.arange(count, dtype=np.int32),
        LOGITS_FROM: np.array([-1 if last else 0]),
    }
    found: NDArray[np.float32] = request.infer(feeds, share_inputs=True, share_outputs=True)[LOGITS]
    return found
