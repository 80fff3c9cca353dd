"""Hidden states in memory, on disk and in files: always the same bytes."""

from __future__ import annotations

import os

import pytest
import torch

from qhub.errors import QhubError
from qhub.spool import Spool

LIMITS = pytest.mark.parametrize("limit", [0, 2500, 1 << 20], ids=["all on disk", "half on disk", "all in memory"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def tensors(count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 10, generator=generator).to(dtype) for _ in range(count)]


def filled(path, limit, values):
    spool = Spool(path, limit)
    for value in values:
        spool.append(value)
    return spool


@LIMITS
@DTYPES
def test_what_goes_in_comes_out_in_order(tmp_path, limit, dtype):
    values = tensors(dtype=dtype)
    spool = filled(tmp_path / "a.spool", limit, values)
    assert len(spool) == 6
    assert all(torch.equal(*pair) for pair in zip(spool, values, strict=True))
    spool.close()


@LIMITS
def test_an_entry_can_be_replaced(tmp_path, limit):
    spool, new = filled(tmp_path / "a.spool", limit, tensors()), [value * 2 for value in tensors()]
    for index in reversed(range(6)):
        spool[index] = new[index].transpose(0, 1).contiguous().transpose(0, 1)
    assert len(spool) == 6
    assert all(torch.equal(*pair) for pair in zip(spool, new, strict=True))
    spool.close()


@LIMITS
@DTYPES
def test_what_is_saved_can_be_loaded(tmp_path, limit, dtype):
    values = tensors(dtype=dtype)
    filled(tmp_path / "a.spool", limit, values).save(tmp_path / "a.hidden")
    assert (tmp_path / "a.hidden").read_bytes() == b"".join(value.view(torch.uint8).numpy().tobytes() for value in values)
    spool = Spool(tmp_path / "b.spool", limit)
    spool.load(tmp_path / "a.hidden", [value.shape for value in values], dtype)
    assert all(torch.equal(*pair) for pair in zip(spool, values, strict=True))
    assert not list(tmp_path.glob("*.partial"))
    spool.close()


def test_only_what_exceeds_the_limit_is_on_disk_and_its_name_is_gone_at_once(tmp_path):
    spool = filled(tmp_path / "a.spool", 1000, tensors())  # 480 bytes each: two stay
    assert spool._memory.keys() == {0, 1}
    assert os.fstat(spool._descriptor()).st_size == 4 * 480
    assert not list(tmp_path.iterdir()), "a killed process leaves nothing behind"
    spool.close()
    assert len(spool) == 0


def test_a_file_of_another_size_is_refused(tmp_path):
    values = tensors()
    filled(tmp_path / "a.spool", 0, values).save(tmp_path / "a.hidden")
    with pytest.raises(QhubError, match=r"has `2880` bytes, not 2400"):
        Spool(tmp_path / "b.spool", 0).load(tmp_path / "a.hidden", [value.shape for value in values[1:]], torch.float32)


def test_tensors_without_numbers_are_no_special_case(tmp_path):
    spool = filled(tmp_path / "a.spool", 0, [torch.empty(0, 4)])
    assert spool[0].shape == (0, 4)
    spool.close()
