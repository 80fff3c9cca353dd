"""A decoder opened by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qhub import DecoderSession, OpenOptions
from qhub_onnxruntime.cache import Cache
from qhub_onnxruntime.decoder import LOGITS_FROM
from qhub_onnxruntime.open import open_graph
from qhub_onnxruntime.schemes import ENGINE


class OnnxSession(DecoderSession):
    """The graph in `path`, with the threads and the precision that `options` ask for."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        super().__init__(path, ENGINE)
        self.graph: onnxruntime.InferenceSession = open_graph(path, options)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V) float32."""
        self.check(ids)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, dtype=np.int64), LOGITS_FROM: np.array([0])}
        nothing = np.empty((len(ids), self.config.kv_heads, 0, self.config.dim), dtype=np.float32)
        feeds |= {put.name: nothing for put in self.graph.get_inputs() if put.name not in feeds}
        found: NDArray[np.float32] = self.graph.run(["logits"], feeds)[0]
        return found

    def open_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens."""
        return Cache(self.graph, self.config, capacity)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one new token reads: every matrix, of the embedding one row."""
        from qhub_onnxruntime.read import weight_bytes

        return weight_bytes(self.path)

    def close(self) -> None:
        """Give memory back."""
        del self.graph
