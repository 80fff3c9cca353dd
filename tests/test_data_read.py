"""`read_data`: every format it reads, how it chooses, and one clear error per way to be wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qhub.data.dataset import TaggedWords, pick, shares
from qhub.data.read import data_sha256, read_data
from qhub.errors import QhubError, UsageError

ASSETS = Path(__file__).parent.parent.parent / "shared" / "assets"


def write_image(path, value=0, size=(4, 6)):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def write_wav(path, samples, *, width=2, channels=1, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, {1: "u1", 2: "<i2", 3: "u1", 4: "<i4"}[width]).tobytes())


@pytest.fixture
def animals(tmp_path):
    """Three classes, named so that their order by name is not that of writing."""
    for number, name in enumerate(("dog", "cat", "bee")):
        for index in range(3):
            write_image(tmp_path / "animals" / name / f"{index}.png", 10 * number + index)
    return tmp_path / "animals"


# Folders of images.


def test_class_folders_are_labels_in_the_order_of_their_names(animals):
    found = read_data(animals)
    assert (found.kind, found.count, found.class_names) == ("image", 9, ("bee", "cat", "dog"))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.labels.dtype == np.int64
    assert [int(image[0, 0, 0]) for image in found.items(2, 5)] == [22, 10, 11]


def test_an_image_is_rgb_bytes_height_first(animals):
    (image,) = read_data(animals).items(0, 1)
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)


def test_classes_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    for name in ("10", "2", "0"):
        write_image(tmp_path / name / "a.png")
    assert read_data(tmp_path).class_names == ("0", "2", "10")


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    write_image(tmp_path / "b.png", 2)
    write_image(tmp_path / "a.jpg", 1)
    (tmp_path / "notes.txt").write_text("no image")
    found = read_data(tmp_path)
    assert (found.count, found.labels, found.class_names) == (2, None, None)
    assert found.where(0) == f"`{tmp_path / 'a.jpg'}`"


def test_a_class_without_files_keeps_its_label(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    write_image(tmp_path / "c" / "1.png")
    found = read_data(tmp_path)
    assert (found.class_names, found.labels.tolist()) == (("a", "b", "c"), [0, 2])


def test_no_image_is_decoded_before_it_is_asked_for(animals):
    (animals / "dog" / "0.png").write_bytes(b"no image")
    found = read_data(animals)
    assert len(found.items(0, 6)) == 6
    with pytest.raises(QhubError, match="it is no picture that Pillow reads") as caught:
        found.items(6, 7)
    assert "dog/0.png" in caught.value.message
    assert caught.value.hint == "replace it, or take it out of the folder"


def test_an_image_that_is_cut_off_is_an_error(tmp_path):
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QhubError, match=r"the image `.*a\.png` cannot be read"):
        read_data(tmp_path).items(0, 1)


def test_a_grey_or_transparent_image_becomes_rgb(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((2, 3), 7, np.uint8)).save(tmp_path / "a.png")
    image.fromarray(np.full((2, 3, 4), 9, np.uint8)).save(tmp_path / "b.png")
    grey, transparent = read_data(tmp_path).items(0, 2)
    assert grey.tolist() == np.full((2, 3, 3), 7).tolist()
    assert transparent.tolist() == np.full((2, 3, 3), 9).tolist()


def refused(path, exit_code=1):
    with pytest.raises(QhubError) as caught:
        read_data(path)
    assert caught.value.exit_code == exit_code
    assert caught.value.hint
    return caught.value.message


def test_an_empty_folder_is_an_error(tmp_path):
    assert refused(tmp_path) == f"`{tmp_path}` holds no images and no sounds"


def test_a_folder_of_class_folders_names_one_to_give(animals):
    with pytest.raises(QhubError, match="holds folders of class folders") as caught:
        read_data(animals.parent)
    assert caught.value.hint == f"give one of them: `{animals}`"


def test_a_file_beside_class_folders_is_an_error(animals):
    write_image(animals / "stray.png")
    assert "`stray.png` beside class folders" in refused(animals)


def test_images_and_sounds_in_one_folder_are_an_error(animals):
    write_wav(animals / "dog" / "bark.wav", [0, 1])
    assert "images and sounds, such as `bark.wav`" in refused(animals)


def test_a_path_that_does_not_exist_is_a_wrong_argument(tmp_path):
    assert refused(tmp_path / "none", 2) == f"data `{tmp_path / 'none'}` does not exist"


def test_an_unknown_suffix_is_a_wrong_argument(tmp_path):
    (tmp_path / "a.xyz").write_text("?")
    assert "no data that is read here (`.xyz`)" in refused(tmp_path / "a.xyz", 2)


# Arrays.


@pytest.fixture
def save(tmp_path):
    def save(*, compressed=True, **arrays):
        path = tmp_path / "data.npz"
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return save


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "stored"])
def test_arrays_with_x_and_y(save, compressed):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    found = read_data(save(compressed=compressed, x=x, y=np.array([3, 1, 2, 0])))
    assert (found.kind, found.labels.tolist()) == ("array", [3, 1, 2, 0])
    assert np.array_equal(found.items(1, 3), x[1:3])


def test_arrays_without_labels(save):
    found = read_data(save(x=np.zeros((3, 2), np.float32)))
    assert (found.count, found.labels) == (3, None)


def test_arrays_in_fortran_order_are_read_in_theirs(save):
    x = np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    assert np.array_equal(read_data(save(x=x)).items(0, 3), x)


def test_a_part_is_chosen_by_its_name(save):
    path = save(test_x=np.zeros((2, 3)), test_y=np.array([0, 1]), train_x=np.ones((3, 3)), train_y=np.array([1, 1, 0]))
    test, train = read_data(f"{path}#test"), read_data(f"{path}#train")
    assert (test.count, train.count, train.labels.tolist()) == (2, 3, [1, 1, 0])
    assert test.source == f"{path}#test"
    assert test.sha256 != train.sha256


def test_several_parts_and_none_said_is_an_error(save):
    path = save(test_x=np.zeros(2), train_x=np.zeros(2))
    with pytest.raises(QhubError, match="several parts: test, train") as caught:
        read_data(path)
    assert caught.value.hint == f"say which: `{path}#test`"


def test_a_part_that_is_not_there_lists_what_is(save):
    message = refused(f"{save(test_x=np.zeros((2, 3)))}#train")
    assert message.endswith("has no array `train_x` (it holds test_x)")


def test_the_only_part_need_not_be_said(save):
    assert read_data(save(test_x=np.zeros((2, 3)), test_y=np.array([0, 1]))).labels.tolist() == [0, 1]


def test_bytes_with_channels_are_pictures_wherever_the_channels_lie(save):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 5, 6, 3), dtype=np.uint8)
    last = read_data(save(x=pixels))
    first = read_data(save(x=pixels.transpose(0, 3, 1, 2)))
    assert (last.kind, first.kind) == ("image", "image")
    assert np.array_equal(last.items(0, 2), first.items(0, 2))


def test_class_names_in_the_file_are_the_classes(save):
    path = save(x=np.zeros((2, 3)), y=np.array([1, 0]), class_names=np.array(["no", "yes"]))
    assert read_data(path).class_names == ("no", "yes")


def test_labels_of_one_column_are_labels(save):
    assert read_data(save(x=np.zeros((2, 3)), y=np.array([[1], [0]]))).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"z": np.zeros(3)}, "has no array `x` (it holds z)"),
        ({"x": np.zeros((3, 2)), "y": np.array([0, 1])}, "has 3 items and 2 labels"),
        ({"x": np.zeros((3, 2)), "y": np.zeros((3, 4), np.int64)}, "is int64 (3, 4); labels are one whole number per item"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "is float64 (3,); labels are one whole number per item"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 0.0]])}, "row 1 of `x`"),
        ({"x": np.array([[1.0], [2.0], [np.inf]])}, "holds infinity"),
        ({"x": np.zeros((0, 2))}, "holds no data"),
        ({"x": np.array(3.0)}, "`x` in"),
        ({"x": np.array([{}, {}], dtype=object)}, "holds Python objects, not numbers"),
    ],
    ids=["no x", "too few labels", "one-hot labels", "labels of floats", "NaN", "infinity", "no rows", "a single number", "objects"],
)
def test_arrays_that_cannot_be_used_are_one_clear_error(save, arrays, said):
    assert said in refused(save(**arrays))


def test_a_file_that_is_no_archive_is_an_error(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    assert "is not an .npz file" in refused(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_an_archive_that_is_cut_off_is_an_error(save, kept):
    path = save(x=np.random.default_rng(0).random((50, 50)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert refused(path)


def test_an_array_whose_header_lies_is_an_error(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    content = (tmp_path / "x.npy").read_bytes().replace(b"(4, 4)", b"(9, 9)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    assert "is damaged (128 bytes for the shape (9, 9))" in refused(tmp_path / "a.npz")


# Texts.


@pytest.fixture
def text(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_a_csv_with_text_and_label_columns(text):
    found = read_data(text("a.csv", 'id,Review,Class\n1,"good, cheap",pos\n2,"two\nlines",neg\n'))
    assert (found.kind, found.class_names, found.labels.tolist()) == ("text", ("neg", "pos"), [1, 0])
    assert found.items(0, 2) == ["good, cheap", "two\nlines"]
    assert found.where(1) == f"line 3 of `{found.source}`"


def test_a_tsv_without_a_header_is_text_and_class_number(text):
    found = read_data(text("a.tsv", 'the "first" one\t1\nsecond\t0\n'))
    assert found.items(0, 2) == ['the "first" one', "second"]
    assert (found.labels.tolist(), found.class_names) == ([1, 0], None)


def test_labels_that_are_numbers_stay_those_numbers(text):
    assert read_data(text("a.csv", "text,label\na,4\nb,2\n")).labels.tolist() == [4, 2]


def test_a_jsonl_with_and_without_labels(text):
    labelled = read_data(text("a.jsonl", '{"text": "a", "label": true}\n\n{"text": "b", "label": false}\n'))
    plain = read_data(text("b.jsonl", '{"content": "a"}\n'))
    assert (labelled.labels.tolist(), labelled.where(1)[:6]) == ([1, 0], "line 3")
    assert (plain.labels, plain.items(0, 1)) == (None, ["a"])


def test_two_text_columns_are_pairs(text):
    found = read_data(text("a.csv", "sentence1,sentence2,label\na,b,0\n"))
    assert found.items(0, 1) == [("a", "b")]


def test_words_with_tags(text):
    rows = [{"tokens": ["Ada", "wrote"], "tags": ["PER", "O"]}, {"tokens": ["Hi"], "tags": ["O"]}]
    found = read_data(text("a.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)))
    assert (found.kind, found.class_names, found.labels) == ("tokens", ("O", "PER"), None)
    assert found.items(0, 2) == [TaggedWords(("Ada", "wrote"), (1, 0)), TaggedWords(("Hi",), (0,))]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id,value\n1,2\n", "has no text column; its columns are `id`, `value`"),
        ("a.csv", "text,label\na,1\nb\n", "line 3 of"),
        ("a.csv", "text,label\na,1\nb,\n", "line 3 of"),
        ("a.csv", "text,label\n", "holds no data"),
        ("a.csv", "", "holds no data"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2 of"),
        ("a.jsonl", '["text"]\n', "is not a JSON object"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', "has no `label`"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "has the label `0.5`"),
        ("a.jsonl", '{"text": "a"}\n{"label": 1}\n', "line 2 of"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n', "has 2 words and 1 tags"),
        ("a.jsonl", '{"tokens": "a b"}\n', "has no list of words in `tokens`"),
    ],
    ids=[
        "no text column", "a cell is missing", "an empty label", "a header alone", "empty", "no JSON", "no object", "no label",
        "a label that is a fraction", "no text", "tags are missing", "words that are a text",
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_names_the_line(text, name, content, said):
    assert said in refused(text(name, content))


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    assert "is not UTF-8 text" in refused(tmp_path / "a.csv")


def test_a_part_of_a_file_without_parts_is_a_wrong_argument(text):
    assert "has no parts" in refused(f"{text('a.csv', 'text,label')}#test", 2)


# Sounds.


@pytest.mark.parametrize(
    ("width", "samples", "expected"),
    [(1, [0, 128, 255], [-1, 0, 127 / 128]), (2, [-32768, 0, 16384], [-1, 0, 0.5]), (4, [-(2**31), 0, 2**30], [-1, 0, 0.5])],
    ids=["8 bits", "16 bits", "32 bits"],
)
def test_sounds_are_floats_from_minus_one_to_one(tmp_path, width, samples, expected):
    write_wav(tmp_path / "yes" / "a.wav", samples, width=width, rate=8000)
    found = read_data(tmp_path)
    (sound,) = found.items(0, 1)
    assert (found.kind, found.class_names, sound.rate, sound.samples.dtype) == ("audio", ("yes",), 8000, np.float32)
    assert sound.samples.tolist() == expected


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", [16384, 0, -16384, -16384], channels=2)
    assert read_data(tmp_path).items(0, 1)[0].samples.tolist() == [0.25, -0.5]


def test_another_width_says_how_to_convert(tmp_path):
    write_wav(tmp_path / "a.wav", [0] * 6, width=3)
    with pytest.raises(QhubError, match="has `24` bits per sample") as caught:
        read_data(tmp_path).items(0, 1)
    assert "ffmpeg" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"no sound", b"RIFF\x00\x00\x00\x00WAVE"], ids=["empty", "text", "a header alone"])
def test_a_file_that_is_no_sound_is_an_error(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(QhubError, match=r"a\.wav"):
        read_data(tmp_path).items(0, 1)


# Choosing.


def test_every_class_gets_its_share_and_the_shares_add_up():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    assert shares(labels, 10) == {0: 5, 1: 3, 2: 2}
    assert sum(shares(labels, 7).values()) == 7
    assert np.bincount(labels[pick(labels, 100, 10, seed=3)]).tolist() == [5, 3, 2]


def test_the_same_seed_chooses_the_same_items_and_another_others():
    labels = np.arange(100) % 4
    first, again, other = (pick(labels, 100, 20, seed).tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_without_a_seed_the_first_of_each_class_are_chosen_in_order():
    assert pick(np.array([0, 0, 0, 1, 1, 1]), 6, 4, None).tolist() == [0, 1, 3, 4]


def test_chosen_items_keep_their_labels_and_places(animals):
    found = read_data(animals, samples=6, seed=7)
    assert np.bincount(found.labels).tolist() == [2, 2, 2]
    for index, (image, label) in enumerate(zip(found.items(0, 6), found.labels, strict=True)):
        assert int(image[0, 0, 0]) // 10 == 2 - label
        assert f"{found.class_names[label]}/" in found.where(index)


def test_more_samples_than_there_are_is_all_of_them(animals):
    assert read_data(animals, samples=100, seed=0).count == 9


def test_no_samples_are_a_wrong_argument(animals):
    with pytest.raises(UsageError, match="`0` samples"):
        read_data(animals, samples=0)


def test_batches_are_all_items_in_order(animals):
    found = read_data(animals)
    sizes = [(len(items), labels.tolist()) for items, labels in found.batches(4)]
    assert sizes == [(4, [0, 0, 0, 1]), (4, [1, 1, 2, 2]), (1, [2])]


# Digests.


def test_the_digest_is_of_the_content_and_not_of_the_choice(animals):
    whole = read_data(animals).sha256
    assert read_data(animals, samples=3, seed=1).sha256 == whole == data_sha256(animals)
    write_image(animals / "dog" / "0.png", 99)
    assert read_data(animals).sha256 != whole


def test_the_digest_of_a_file_is_what_sha256sum_prints(text):
    path = text("a.csv", "text,label\na,1\n")
    assert read_data(path).sha256 == data_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_moved_folder_keeps_its_digest_and_a_renamed_class_does_not(animals):
    before = read_data(animals).sha256
    moved = animals.rename(animals.parent / "other")
    assert read_data(moved).sha256 == before
    (moved / "bee").rename(moved / "ant")
    assert read_data(moved).sha256 != before


# Damage: whatever bytes are changed or missing, it is data or one clear error.


@pytest.fixture(params=["x.npz", "stored.npz", "a.csv", "a.jsonl", "a.png", "a.jpg", "a.wav"])
def whole(request, tmp_path):
    """A sound file and where it lies; images and sounds are read through their folder."""
    path = tmp_path / "data" / request.param
    path.parent.mkdir()
    if path.suffix == ".npz":
        (np.savez if path.stem == "stored" else np.savez_compressed)(path, x=np.random.default_rng(0).random((20, 30)), y=np.arange(20))
    elif path.suffix == ".wav":
        write_wav(path, np.arange(300))
    elif path.suffix in (".png", ".jpg"):
        write_image(path, 9)
    else:
        path.write_text("text,label\n" + "hello,1\n" * 20 if path.suffix == ".csv" else '{"text": "a", "label": 1}\n' * 20)
    return path


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_found_or_harmless(whole, seed):
    dice = random.Random(seed)
    content = whole.read_bytes()
    for round_number in range(60):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 3, 20))):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        whole.write_bytes(damaged[: dice.randrange(len(damaged))] if round_number % 4 == 0 else damaged)
        with contextlib.suppress(QhubError):
            read_data(whole if whole.suffix in (".npz", ".csv", ".jsonl") else whole.parent).items(0, 50)


# Real data, where it lies beside the checkout.


@pytest.mark.parametrize(
    ("name", "kind", "count", "classes"),
    [("cifar10/cifar10_subset.npz#test", "image", 1000, 10), ("sst2/test.tsv", "text", 1821, 2), ("micro-speech", "audio", 4, 0)],
)
def test_real_data_is_read(name, kind, count, classes):
    if not (ASSETS / name.partition("#")[0]).exists():
        pytest.skip(f"{ASSETS / name} is not here")
    found = read_data(ASSETS / name)
    assert (found.kind, found.count) == (kind, count)
    assert (0 if found.labels is None else len(np.unique(found.labels))) == classes
    assert len(found.items(0, 2)) == 2
