"""Norms, in the form that OpenVINO's plugins make one operation of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qhub_openvino.vendor import ops, ov


def rms_norm(source: ov.Output, weight: NDArray[np.float32], eps: float) -> ov.Output:
    """source (…, D) over the root of its mean square, times weight (D)."""
    mean = ops.reduce_mean(ops.power(source, np.float32(2)), np.array([-1]), True)
    root = ops.sqrt(ops.add(mean, np.float32(eps)))
    normed = ops.multiply(source, ops.divide(np.float32(1), root))
    return ops.multiply(normed, ops.constant(weight)).output(0)
