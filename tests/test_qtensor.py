"""The definition: scales that every format holds exactly, codes that dequantize to what was meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qhub.errors import Unsupported
from qhub.quantize.qtensor import LARGEST_SCALE, QTensor, dequantize, encode, group_size_of, round_scale
from qhub.types import Scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def every_magnitude():
    """Positive float32 numbers from below the smallest to the largest scale, dense around what fp16 and bf16 hold."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.rand(20_000, generator=generator) * 40 - 24)
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()  # every fp16 number
    around = torch.cat([halves, torch.nextafter(halves, torch.tensor(torch.inf)), torch.nextafter(halves, torch.tensor(0.0))])
    return torch.cat([spread, around, torch.tensor([1e-30, 1e-45, 2.0**-25, 2.0**-24, 65279.0])])


def limit_of(dtype):
    return LARGEST_SCALE.get(dtype, 65504.0)


@DTYPES
def test_a_rounded_scale_is_exact_in_fp16_and_in_the_artifacts_dtype(dtype):
    rounded = round_scale(every_magnitude(), dtype)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded.half().float(), rounded)
    assert torch.equal(rounded.to(dtype).float(), rounded)
    assert float(rounded.min()) == 2.0**-24


@DTYPES
def test_a_rounded_scale_is_the_nearest_one_that_is_not_below(dtype):
    scale = every_magnitude()
    scale = scale[scale <= limit_of(dtype)]
    rounded = round_scale(scale, dtype)
    assert bool((rounded >= scale).all())
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float().numpy()
    allowed = torch.from_numpy(halves)
    if dtype == torch.bfloat16:
        allowed = allowed[allowed.bfloat16().float() == allowed]
    expected = allowed[torch.searchsorted(allowed, scale)]
    assert torch.equal(rounded, expected)


@DTYPES
@pytest.mark.parametrize("huge", [65504.0, 65505.0, 1e9, 3.4e38])
def test_a_scale_beyond_fp16_becomes_the_largest_that_is_exact(dtype, huge):
    assert float(round_scale(torch.tensor([huge]), dtype)) == limit_of(dtype)


def random_qtensor(bits, *, symmetric, rows=6, groups=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * size), generator=generator, dtype=torch.uint8)
    scale = round_scale(torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3, torch.bfloat16)
    zero = torch.randint(1, 2**bits, (rows, groups), generator=generator).float()
    zero = torch.full_like(zero, 2.0 ** (bits - 1)) if symmetric else zero
    return QTensor(codes, scale, zero, bits, symmetric)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_encoding_what_was_dequantized_gives_the_same_codes(bits, symmetric):
    tensor = random_qtensor(bits, symmetric=symmetric)
    weight = tensor.dequantize()
    assert torch.equal(encode(weight, tensor.scale, tensor.zero, bits), tensor.codes)
    assert weight.shape == tensor.codes.shape


def test_dequantizing_is_the_formula_of_the_definition():
    tensor = random_qtensor(4, symmetric=False)
    codes, scale, zero = (part.double().numpy() for part in (tensor.codes, tensor.scale, tensor.zero))
    group = np.arange(codes.shape[1]) // tensor.group_size
    expected = (codes - zero[:, group]) * scale[:, group]
    assert np.array_equal(tensor.dequantize().double().numpy(), expected), "float32 holds the product exactly"
    assert torch.equal(tensor.dequantize(torch.bfloat16), torch.from_numpy(expected).bfloat16()), "rounded once"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_encoding_clips_to_the_first_and_the_last_code(bits):
    weight = torch.tensor([[-1e6, -1.0, 0.0, 1e6]])
    codes = encode(weight, torch.tensor([[1.0]]), torch.tensor([[1.0]]), bits)
    assert codes.tolist() == [[0, 0, 1, 2**bits - 1]]


def test_encode_and_dequantize_leave_their_arguments_alone():
    tensor = random_qtensor(4, symmetric=False)
    weight = torch.randn(tensor.codes.shape)
    kept = [part.clone() for part in (weight, tensor.codes, tensor.scale, tensor.zero)]
    encode(weight, tensor.scale, tensor.zero, 4)
    dequantize(tensor.codes, tensor.scale, tensor.zero)
    assert all(torch.equal(*pair) for pair in zip((weight, tensor.codes, tensor.scale, tensor.zero), kept, strict=True))


def test_rows_are_a_qtensor_of_their_own():
    tensor = random_qtensor(3, symmetric=False)
    part = tensor.rows(2, 5)
    assert torch.equal(part.dequantize(), tensor.dequantize()[2:5])
    assert (part.bits, part.symmetric, part.group_size) == (3, False, 16)


@pytest.mark.parametrize(
    ("symmetric", "expected"),
    [(True, (3 * 384 + 16 * 24 + 7) // 8), (False, (3 * 384 + 19 * 24 + 7) // 8)],
    ids=["symmetric", "asymmetric"],
)
def test_bytes_count_codes_scales_and_the_zeros_that_are_stored(symmetric, expected):
    assert random_qtensor(3, symmetric=symmetric).bytes == expected


def test_a_group_size_that_does_not_divide_is_refused_with_the_numbers():
    assert group_size_of(Scheme.parse("w4a16-g32-sym"), 96) == 32
    assert group_size_of(Scheme.parse("w8a16"), 96) == 96
    with pytest.raises(Unsupported, match="group size `64` does not divide the layer's `96` inputs"):
        group_size_of(Scheme.parse("w4a16-g64-sym"), 96)
