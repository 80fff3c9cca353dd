"""Token windows: packed, deterministic, begun with BOS; and what is said when the data does not do."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tiny_models import tiny_model, write_tokenizer

from qhub.errors import QhubError, UsageError
from qhub.tokens import documents, load_tokenizer, read_windows

TEXT = "".join(chr(33 + (index * 7) % 90) for index in range(2000))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_model("llama"))


@pytest.fixture
def text_file(tmp_path):
    def write(text, name="data.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def body(windows):
    """What follows the BOS of each window, as text."""
    return "".join(chr(code) for code in windows.ids[:, 1:].reshape(-1))


def test_windows_are_consecutive_and_each_begins_with_bos(tokenizer, text_file):
    windows = read_windows(tokenizer, text_file(TEXT), 5, 32)
    assert windows.ids.shape == (5, 32)
    assert windows.ids.dtype == np.int64
    assert (windows.ids[:, 0] == tokenizer.bos_token_id).all()
    assert body(windows) == TEXT[: 5 * 31]


def test_a_tokenizer_without_bos_uses_the_whole_window(tmp_path, text_file):
    write_tokenizer(tmp_path, bos=False)
    windows = read_windows(load_tokenizer(tmp_path), text_file(TEXT), 3, 16)
    assert "".join(chr(code) for code in windows.ids.reshape(-1)) == TEXT[:48]


def test_a_seed_draws_windows_from_the_whole_file_and_repeats_itself(tokenizer, text_file):
    path = text_file(TEXT)
    state = random.getstate()
    one, same, other = (read_windows(tokenizer, path, 6, 32, seed=seed) for seed in (3, 3, 4))
    assert random.getstate() == state, "the global random state was touched"
    assert one.sha256 == same.sha256 != other.sha256
    assert (one.ids == same.ids).all()
    pieces = [TEXT[start : start + 31] for start in range(0, len(TEXT) - 30, 31)]
    drawn = [pieces.index("".join(chr(code) for code in row[1:])) for row in one.ids]
    assert drawn == sorted(set(drawn)), "windows are different ones, in the order of the file"
    assert max(drawn) > 6, "a seed draws from all of the file"


def test_too_little_data_says_how_much_is_needed(tokenizer, text_file):
    path = text_file("x" * 100)
    with pytest.raises(QhubError) as error:
        read_windows(tokenizer, path, 10, 32)
    assert error.value.message == f"`{path}` gives `100` tokens; 10 samples of 32 need 310"
    assert error.value.hint == "give about 4 times as much text, or use `--samples 3`"


@pytest.mark.parametrize(
    ("text", "hint"),
    [("", "give a file with text"), ("xyz", "give about 104 times as much text")],
    ids=["an empty file", "not even one window"],
)
def test_the_hint_names_no_sample_count_that_would_fail_too(tokenizer, text_file, text, hint):
    with pytest.raises(QhubError) as error:
        read_windows(tokenizer, text_file(text), 10, 32)
    assert error.value.hint == hint


def test_where_the_number_of_windows_is_fixed_the_hint_is_shorter_ones(tokenizer, text_file):
    path = text_file("x" * 100)
    with pytest.raises(QhubError) as error:
        read_windows(tokenizer, path, 10, 32, fewer=None)
    assert error.value.hint == "give about 4 times as much text, or use `--seq-len 11`"
    assert read_windows(tokenizer, path, 10, 11, fewer=None).ids.shape == (10, 11)


def test_all_there_is_may_be_fewer_windows_but_not_none(tokenizer, text_file):
    path = text_file("x" * 100)
    assert read_windows(tokenizer, path, 10, 32, all_there_is=True).ids.shape == (3, 32)
    assert read_windows(tokenizer, path, 2, 32, all_there_is=True).ids.shape == (2, 32)
    with pytest.raises(QhubError, match="gives `100` tokens"):
        read_windows(tokenizer, path, 10, 128, all_there_is=True)


@pytest.mark.parametrize("seq_len", [0, 1])
def test_a_window_of_one_token_has_nothing_to_predict(tokenizer, text_file, seq_len):
    with pytest.raises(UsageError, match="has nothing to predict"):
        read_windows(tokenizer, text_file(TEXT), 4, seq_len)


def test_half_a_character_in_json_is_no_obstacle(tokenizer, text_file):
    path = text_file('{"text": "ab\\ud800cd"}\n' * 40, "data.jsonl")
    assert body(read_windows(tokenizer, path, 1, 6)) == "ab?cd"


def test_text_that_packs_unusually_well_is_read_to_its_end(tmp_path, text_file):
    """The bound on how much text is read must not turn a long enough file into one that is too short."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = {"<unk>": 0, " ": 1}, []
    for power in range(6):  # 64 spaces are one token
        merges.append((" " * 2**power, " " * 2**power))
        vocabulary[" " * 2 ** (power + 1)] = len(vocabulary)
    wide = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>")))
    windows = read_windows(wide, text_file(" " * 64 * 40), 2, 20)
    assert windows.ids.shape == (2, 20)


def test_jsonl_and_parquet_hold_the_same_documents_as_text(tmp_path, tokenizer, text_file):
    parts = [TEXT[:300], TEXT[300:310], TEXT[310:]]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"id": [1, 2, 3, 4], "text": [*parts, None]})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    lines = [json.dumps({"id": 1, "text": parts[0]}), "", json.dumps({"content": parts[1]}), json.dumps(parts[2])]
    files = [text_file(TEXT), text_file("\n".join(lines), "data.jsonl"), tmp_path / "data.parquet"]
    digests = {read_windows(tokenizer, path, 40, 32).sha256 for path in files}
    assert len(digests) == 1
    assert [list(documents(path)) for path in files[1:]] == [parts, parts]


BAD = {
    "not UTF-8": ("data.txt", b"abc\xff\xfe", "is not UTF-8 text (invalid start byte at byte 3)"),
    "no JSON": ("data.jsonl", b'{"text": "a"}\nnonsense\n', "line 2 of"),
    "JSON lines that are not UTF-8": ("data.jsonl", b'{"text": "\xff"}\n', "line 1 of"),
    "a row without text": ("data.jsonl", b'{"text": 5}\n', "has no text"),
    "no parquet": ("data.parquet", b"PAR1nonsense", "is not a parquet file"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD.values(), ids=BAD)
def test_bad_data_is_one_clear_error(text_file, name, content, said):
    path = text_file(content, name)
    with pytest.raises(QhubError) as error:
        list(documents(path))
    assert said in error.value.message
    assert f"`{path}`" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("column", ["number", "text"], ids=["no column of that name", "a column of numbers"])
def test_parquet_without_a_text_column_is_one_clear_error(tmp_path, column):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table({column: [1, 2]}), tmp_path / "data.parquet")
    with pytest.raises(QhubError, match="has no text column"):
        list(documents(tmp_path / "data.parquet"))


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        list(documents(tmp_path / "nothing.txt"))


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(QhubError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)
