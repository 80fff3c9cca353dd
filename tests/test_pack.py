"""Codes to words and back, word for word what compressed-tensors writes and reads."""

from __future__ import annotations

import pytest
import torch

from qhub.quantize import pack as module
from qhub.quantize.pack import pack, unpack

BITS = pytest.mark.parametrize("bits", range(2, 9))
COLUMNS = pytest.mark.parametrize("columns", [1, 2, 7, 8, 11, 32, 33, 64, 127, 130])


def random_codes(rows, columns, bits):
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.uint8)


@BITS
@COLUMNS
def test_unpacking_gives_back_what_was_packed(bits, columns):
    codes = random_codes(5, columns, bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpack(words, bits, columns), codes)


@BITS
@COLUMNS
def test_words_are_those_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(5, columns, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    back = helpers.unpack_from_int32(pack(codes, bits), bits, torch.Size([5, columns]))
    assert torch.equal(back, signed)


def test_the_first_code_is_the_lowest_and_a_code_may_cross_words():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
    ones = torch.zeros(1, 11, dtype=torch.uint8)
    ones[0, 10] = 0b111  # bits 30, 31 and 32
    assert pack(ones, 3).tolist() == [[-(2**30), 1]]


@pytest.mark.parametrize("bits", [3, 4])
def test_many_rows_are_packed_in_pieces_with_the_same_result(bits):
    codes = random_codes(module._ROWS_AT_ONCE + 3, 16, bits)
    words = pack(codes, bits)
    assert torch.equal(words[-3:], pack(codes[-3:], bits))
    assert torch.equal(unpack(words, bits, 16), codes)


def test_memory_that_is_not_contiguous_is_packed_too():
    codes = random_codes(8, 12, 4)
    words = pack(codes.t().contiguous(), 4)
    assert torch.equal(pack(codes.t(), 4), words)
    turned = words.t().contiguous().t()
    assert torch.equal(unpack(turned, 4, 8), codes.t())
