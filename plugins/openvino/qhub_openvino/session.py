"""A decoder opened by OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qhub import DecoderSession, OpenOptions
from qhub_openvino.cache import Cache, run
from qhub_openvino.open import compile_decoder
from qhub_openvino.schemes import ENGINE
from qhub_openvino.vendor import ov


class OpenVinoSession(DecoderSession):
    """The decoder in `path`, with the threads and the precision that `options` ask for."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        super().__init__(path, ENGINE)
        self.compiled: ov.CompiledModel = compile_decoder(path, options)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V) float32."""
        self.check(ids)
        return run(self.compiled.create_infer_request(), ids.astype(np.int64), 0, last=False).copy()

    def open_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens."""
        return Cache(self.compiled, capacity)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one new token reads: every matrix, of the embedding one row."""
        from qhub_openvino.read import weight_bytes

        return weight_bytes(self.path)

    def close(self) -> None:
        """Give memory back."""
        del self.compiled
