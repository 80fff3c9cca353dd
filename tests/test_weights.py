"""Safetensors files: one test per way in which a file or a folder can be malformed, and that good ones are read exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qhub.errors import QhubError
from qhub.weights import WeightFiles, read_header

HINT = "download it again, or check how it was written"


def raw(header, data=b"", *, claimed=None):
    """The bytes of a safetensors file with `header` (an object or bytes) before `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def entry(shape=(2, 2), dtype="F32", offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    # The file as a whole.
    "empty": (b"", "it has `0` bytes"),
    "shorter-than-a-header": (b"\x02\0\0\0\0\0\0\0{", "it has `9` bytes"),
    "header-longer-than-the-file": (raw({}, claimed=1000), "its header claims `1000` bytes in a file of `10`"),
    "header-of-absurd-size": (raw({}, claimed=2**63), f"its header claims `{2**63}` bytes in a file of `10`"),
    "header-is-not-json": (raw(b"{'a': 1}"), "its header is not JSON"),
    "header-is-not-utf8": (raw(b'{"\xff\xfe": 1}'), "its header is not JSON"),
    "header-is-a-list": (raw([]), "its header is not a JSON object"),
    "header-nests-too-deep": (raw(b"[" * 100_000), "its header is not JSON"),
    "name-given-twice": (raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)), "tensor `a` is listed twice"),
    # The entry of one tensor.
    "entry-is-not-an-object": (raw({"a": 1}), "the entry of tensor `a` is malformed"),
    "entry-without-dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "the entry of tensor `a` is malformed"),
    "entry-without-shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "the entry of tensor `a` is malformed"),
    "shape-is-not-numbers": (raw({"a": entry(shape=("x",))}, bytes(16)), "the entry of tensor `a` is malformed"),
    "shape-is-not-whole": (raw({"a": entry(shape=(2.5, 2))}, bytes(16)), "the entry of tensor `a` is malformed"),
    "three-offsets": (raw({"a": entry(offsets=(0, 8, 16))}, bytes(16)), "the entry of tensor `a` is malformed"),
    "offsets-are-not-numbers": (raw({"a": entry(offsets=("0", "16"))}, bytes(16)), "the entry of tensor `a` is malformed"),
    "unknown-dtype": (raw({"a": entry(dtype="F12")}, bytes(16)), "tensor `a` has unknown dtype `F12`"),
    # Numbers that do not add up.
    "fewer-bytes-than-the-shape": (
        raw({"a": entry(offsets=(0, 12))}, bytes(12)),
        "tensor `a` of shape [2, 2] F32 needs 16 bytes but claims `12`",
    ),
    "negative-size": (raw({"a": entry(shape=(-2, -2))}, bytes(16)), "tensor `a` of shape [-2, -2] F32 needs 16 bytes but claims `16`"),
    "offsets-backwards": (raw({"a": entry(offsets=(16, 0))}, bytes(16)), "tensor `a` of shape [2, 2] F32 needs 16 bytes but claims `-16`"),
    "starts-before-the-data": (
        raw({"a": entry(offsets=(-8, 8))}, bytes(16)),
        "tensor `a` of shape [2, 2] F32 needs 16 bytes but claims `16`",
    ),
    "huge-shape": (
        raw({"a": entry(shape=(2**40, 2**40))}, bytes(16)),
        f"tensor `a` of shape [{2**40}, {2**40}] F32 needs {2**82} bytes but claims `16`",
    ),
    "truncated-data": (raw({"a": entry()}, bytes(15)), "of a file of"),
    "overlapping-tensors": (raw({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)), "tensors `a` and `b` overlap"),
}


@pytest.mark.parametrize(("content", "why"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_file_is_refused_with_the_reason(tmp_path, content, why):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(QhubError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"`{path}` is not a valid safetensors file: ")
    assert why in caught.value.message
    assert caught.value.hint == HINT


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(QhubError, match=r"none.safetensors` does not exist$"):
        read_header(tmp_path / "none.safetensors")


def test_good_file_is_read_exactly_as_it_was_written(tmp_path):
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(4, dtype=np.float16),
        "scalar": np.array(7, dtype=np.int64),
        "nothing": np.zeros((0, 5), dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = WeightFiles.open(tmp_path)
    assert set(weights) == set(arrays)
    assert len(weights) == 4
    for name, array in arrays.items():
        info = weights[name]
        assert (info.shape, info.bytes) == (array.shape, array.nbytes)
        buffer = bytearray(info.bytes)
        weights.read_into(name, memoryview(buffer))
        assert bytes(buffer) == array.tobytes()


def test_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    save_file({"a": np.ones(100, dtype=np.float32)}, tmp_path / "model.safetensors")
    weights = WeightFiles.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(weights["a"].offset + 40)
    with pytest.raises(QhubError, match="tensor `a` ends after `40` of 400 bytes"):
        weights.read_into("a", memoryview(bytearray(400)))


def shards(folder, **files):
    """Write each file's arrays, and an index that maps every name to its file."""
    weight_map = {}
    for stem, names in files.items():
        save_file({name: np.full(4, index, dtype=np.float32) for index, name in enumerate(names)}, folder / f"{stem}.safetensors")
        weight_map |= dict.fromkeys(names, f"{stem}.safetensors")
    return weight_map


def index(folder, document):
    path = folder / "model.safetensors.index.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_sharded_folder_is_one_mapping(tmp_path):
    index(tmp_path, {"metadata": {}, "weight_map": shards(tmp_path, one=["a", "b"], two=["c"])})
    weights = WeightFiles.open(tmp_path)
    assert sorted(weights) == ["a", "b", "c"]
    assert [path.name for path in weights.files()] == ["one.safetensors", "two.safetensors"]


def test_shards_without_an_index_are_taken_together(tmp_path):
    shards(tmp_path, one=["a"], two=["c"])
    assert sorted(WeightFiles.open(tmp_path)) == ["a", "c"]


@pytest.mark.parametrize(
    "document",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["one.safetensors"]}}'],
    ids=["empty", "a-list", "no-map", "map-is-a-list", "file-is-a-number", "file-is-a-list"],
)
def test_broken_index_is_refused(tmp_path, document):
    path = index(tmp_path, document)
    with pytest.raises(QhubError) as caught:
        WeightFiles.open(tmp_path)
    assert caught.value.message == f"`{path}` is not a valid index of shards"


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/one.safetensors"])
def test_index_that_leaves_its_folder_is_refused(tmp_path, shard):
    path = index(tmp_path, {"weight_map": {"a": shard}})
    with pytest.raises(QhubError) as caught:
        WeightFiles.open(tmp_path)
    assert caught.value.message == f"`{path}` names a file outside its folder"


def test_index_that_names_a_missing_shard_is_refused(tmp_path):
    index(tmp_path, {"weight_map": {"a": "gone.safetensors"}})
    with pytest.raises(QhubError, match=r"gone.safetensors` does not exist$"):
        WeightFiles.open(tmp_path)


def test_index_that_names_a_missing_tensor_is_refused(tmp_path):
    path = index(tmp_path, {"weight_map": {**shards(tmp_path, one=["a"]), "b": "one.safetensors"}})
    with pytest.raises(QhubError) as caught:
        WeightFiles.open(tmp_path)
    assert caught.value.message == f"`{path}` says that `one.safetensors` holds `b`, which it does not"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.ckpt"])
def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(QhubError) as caught:
        WeightFiles.open(tmp_path)
    assert caught.value.message == f"`{tmp_path / name}` is a pickle, which can run code when it is opened; qhub reads safetensors only"
    assert f"from_pretrained('{tmp_path}').save_pretrained('{tmp_path}-safetensors')" in caught.value.hint


def test_folder_without_weights_says_what_a_model_folder_holds(tmp_path):
    with pytest.raises(QhubError) as caught:
        WeightFiles.open(tmp_path)
    assert (caught.value.message, caught.value.hint) == (
        f"`{tmp_path}` has no safetensors files",
        "a model folder holds config.json and *.safetensors",
    )
