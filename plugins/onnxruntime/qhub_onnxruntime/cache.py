"""Keys and values of a sequence, in memory that the graph writes into: a token costs no copy of those before it."""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qhub import DecoderConfig, QhubError
from qhub_onnxruntime.decoder import LOGITS_FROM, cache_names


class Cache:
    """Room for `capacity` tokens of one sequence; past and present are the same arrays (kv heads, capacity, head) float32."""

    def __init__(self, graph: onnxruntime.InferenceSession, config: DecoderConfig, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._graph, self._binding = graph, graph.io_binding()
        shape = (1, config.kv_heads, capacity, config.dim)
        self._arrays = []  # pages are taken when they are first written
        for block in range(config.layers):
            for past, present in zip(cache_names(block), cache_names(block, "present"), strict=True):
                array = np.zeros(shape, dtype=np.float32)
                self._arrays.append(array)
                self._binding.bind_input(past, "cpu", 0, np.float32, shape, array.ctypes.data)
                self._binding.bind_output(present, "cpu", 0, np.float32, shape, array.ctypes.data)
        self._logits = np.empty((1, 1, config.vocabulary), dtype=np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        self._binding.bind_cpu_input(LOGITS_FROM, np.array([-1]))
        self._mask = np.ones((1, capacity), dtype=np.int64)

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append ids (1, T); the logits (V) float32 after the last of them, valid until the next step.

        :raises QhubError: when there is no room for them.
        """
        total = self.length + ids.shape[1]
        if total > self.capacity:
            message = f"`{ids.shape[1]}` tokens do not fit: `{self.length}` of {self.capacity} are kept"
            raise QhubError(message, hint="shorten the prompt, or begin again")
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        self._graph.run_with_iobinding(self._binding)
        self.length = total
        return self._logits[0, 0]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)
