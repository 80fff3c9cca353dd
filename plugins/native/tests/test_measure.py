"""What the runtime measures of this machine: products, and the peak of a kernel's instruction."""

import numpy as np
import pytest
from qhub_native import _native
from qhub_native.matrices import aligned

KERNELS = _native.kernel_names()


def packed(pool):
    shape = _native.Shape(32, 64, group=32, bits=4, symmetric=True)
    memory = aligned(shape.packed_bytes)
    part = _native.Part(np.full((32, 32), 0x98, np.uint8), np.full((32, 2), 0.5, np.float32), None, bits=4, every=32)
    return _native.Linear.quantized(memory, shape, _native.pack(pool, shape, [part], memory))


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_product_is_timed_on_its_own_and_at_least_four_times(kernel):
    pool = _native.Pool(2)
    times = _native.time_plan([packed(pool)], pool, 3, kernel, 8, 0, 0.0)
    assert len(times) >= 4
    assert min(times) > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_peak_of_an_instruction_is_a_rate_or_not_known(kernel):
    peak = _native.peak_operations(_native.Pool(1), kernel, 0.01)
    assert peak == 0 if kernel == "scalar" else peak == 0 or 1e9 < peak < 1e14


def test_a_wider_instruction_has_the_higher_peak():
    peaks = {kernel: _native.peak_operations(_native.Pool(1), kernel, 0.05) for kernel in KERNELS}
    if not {"avx512_vnni", "avx_vnni"} <= peaks.keys():
        pytest.skip("this processor does not run both avx512_vnni and avx_vnni")
    assert peaks["avx512_vnni"] > peaks["avx_vnni"]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_threads_divide_a_product_without_gap_or_overlap(threads, rows):
    pool = _native.Pool(threads)
    x = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    alone = packed(_native.Pool(1)).multiply(_native.Pool(1), KERNELS[0], False, x)
    for _ in range(50):
        np.testing.assert_array_equal(packed(pool).multiply(pool, KERNELS[0], False, x), alone)
