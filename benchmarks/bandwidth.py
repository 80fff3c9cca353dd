"""How fast threads read memory together: the limit that generation is measured against.

    python benchmarks/bandwidth.py [THREADS …]

Uses the reader of `qhub-native` where it is installed (the best pass of a second), else numpy, which a slow core may hold back.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy as np

ARRAY_BYTES = 1 << 30
PASSES = 3
SECONDS = 1.0


def read_bandwidth(threads: int) -> float:
    """GB/s (10⁹ bytes) that `threads` threads read from memory in all."""
    try:
        from qhub_native import _native
    except ImportError:
        return _numpy_bandwidth(threads)
    return float(_native.read_bandwidth(_native.Pool(threads), ARRAY_BYTES, SECONDS)) / 1e9


def _numpy_bandwidth(threads: int) -> float:
    arrays = np.ones((threads, ARRAY_BYTES // threads // 4), np.float32)
    start = threading.Barrier(threads + 1)

    def work(array: np.ndarray) -> None:
        start.wait()
        for _ in range(PASSES):
            array.max()

    workers = [threading.Thread(target=work, args=(array,)) for array in arrays]
    for worker in workers:
        worker.start()
    start.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    return PASSES * arrays.nbytes / (time.perf_counter() - begin) / 1e9


if __name__ == "__main__":
    for count in map(int, sys.argv[1:] or ("1", "2")):
        print(f"{count} threads: {read_bandwidth(count):.1f} GB/s")
