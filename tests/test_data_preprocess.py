"""Preprocessing: the same numbers as transformers' own processors, `preprocess.json`, texts, sounds, and shapes that do not fit."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from qhub.data.classes import fit_labels
from qhub.data.dataset import Sound, TaggedWords
from qhub.data.encode import IGNORED, load_text_steps
from qhub.data.images import center_crop, shortest_edge
from qhub.data.pictures import ImageSteps, Resize
from qhub.data.preprocess import find_preprocessor, model_inputs
from qhub.data.read import read_data
from qhub.errors import QhubError, UsageError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(height=40, width=60, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(folder, **data):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in data.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# The common image processors: ours against transformers'. Sizes that are square, that keep the ratio, crops within and beyond.

NORMAL = {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "do_rescale": True, "rescale_factor": 1 / 255}
CONFIGS = {
    "ViT, square": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 32}, "resample": 2, **NORMAL},
    "ViT, not resized": {"image_processor_type": "ViTImageProcessor", "do_resize": False, **NORMAL},
    "ViT, one number": {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 16, "resample": 3, **NORMAL},
    "CLIP, shorter side and crop": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24}, **NORMAL,
    },
    "CLIP, crop beyond the picture": {
        "image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": True,
        "crop_size": {"height": 51, "width": 70}, **NORMAL,
    },
    "ConvNeXT below 384": {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3, **NORMAL,
    },
    "ConvNeXT from 384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 3, **NORMAL},
    "BiT, without normalising": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20}, "resample": 2, "do_center_crop": False,
        "do_normalize": False, "do_rescale": True, "rescale_factor": 0.5,
    },
}  # fmt: skip


def processor_of(folder):
    """transformers' own, or a skip where it is not installed or needs torchvision."""
    transformers = pytest.importorskip("transformers")
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(40, 60), (61, 33)], ids=["wide", "tall"])
def test_pictures_become_the_same_numbers_as_by_transformers(tmp_path, config, size):
    save(tmp_path, preprocessor_config=config)
    steps = find_preprocessor(tmp_path, "image")
    assert isinstance(steps, ImageSteps)
    pixels = picture(*size)
    expected = processor_of(tmp_path)(images=[pixels], return_tensors="np", input_data_format="channels_last")["pixel_values"]
    ours = steps.batch([pixels])["pixel_values"]
    assert (ours.dtype, ours.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_a_processor_with_steps_of_its_own_is_run_by_transformers(tmp_path):
    config = {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
    save(tmp_path, preprocessor_config={**config, **NORMAL})
    expected = processor_of(tmp_path)(images=[picture()], return_tensors="np", input_data_format="channels_last")["pixel_values"]
    ours = find_preprocessor(tmp_path, "image").batch([picture()])["pixel_values"]
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("missing", ["size", "resample", "image_mean"])
def test_values_left_to_defaults_are_left_to_transformers(tmp_path, missing):
    config = {key: value for key, value in CONFIGS["ViT, square"].items() if key != missing}
    save(tmp_path, preprocessor_config=config)
    processor_of(tmp_path)
    assert not isinstance(find_preprocessor(tmp_path, "image"), ImageSteps)


def test_arrays_of_floats_pass_as_they_are(tmp_path):
    save(tmp_path, preprocessor_config=CONFIGS["ViT, square"])
    x = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    assert np.array_equal(find_preprocessor(tmp_path, "array").batch(list(x))["pixel_values"], x)


# preprocess.json: each key.


def own(tmp_path, **data):
    return find_preprocessor(save(tmp_path, preprocess=data), "image", inputs=("x",))


def test_a_description_of_our_own_scales_and_normalises(tmp_path):
    batch = own(tmp_path, layout="nchw", size=[8, 8], scale="1/255", mean=[0.5, 0.5, 0.5], std=[0.25, 0.5, 1.0]).batch(
        [np.full((8, 8, 3), 255, np.uint8)]
    )
    assert batch["x"].shape == (1, 3, 8, 8)
    np.testing.assert_allclose(batch["x"][0, :, 0, 0], [2.0, 1.0, 0.5])


def test_layout_nhwc_keeps_channels_last(tmp_path):
    assert own(tmp_path, layout="nhwc").batch([picture(4, 5)])["x"].shape == (1, 4, 5, 3)


def test_bgr_reverses_the_channels_before_normalising(tmp_path):
    blue = np.zeros((2, 2, 3), np.uint8)
    blue[..., 2] = 10
    values = own(tmp_path, layout="nhwc", channels="bgr", mean=[1, 2, 3], std=[1, 1, 1]).batch([blue])["x"]
    assert values[0, 0, 0].tolist() == [9, -2, -3]


def test_grey_has_one_channel(tmp_path):
    assert own(tmp_path, channels="grey").batch([picture(4, 5)])["x"].shape == (1, 1, 4, 5)


def test_whole_numbers_as_output_are_rounded_and_kept_in_range(tmp_path):
    steps = own(tmp_path, layout="nhwc", mean=[128], std=[0.5], dtype="int8")
    pixels = np.array([[[0, 128, 255], [129, 127, 100]]], np.uint8)
    values = steps.batch([pixels])["x"]
    assert (values.dtype, values[0].tolist()) == (np.int8, [[[-128, 0, 127], [2, -2, -56]]])


def test_the_file_names_the_input(tmp_path):
    assert list(own(tmp_path, input="image").batch([picture()])) == ["image"]


def test_yaml_is_read_too_and_a_given_file_comes_first(tmp_path):
    save(tmp_path / "model", preprocess={"layout": "nchw"})
    given = tmp_path / "mine.yaml"
    given.write_text("layout: nhwc\nscale: 1/255\n")
    steps = find_preprocessor(tmp_path / "model" / "model.onnx", "image", given=given)
    assert steps.batch([picture(4, 5)])["pixel_values"].shape == (1, 4, 5, 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"laoyut": "nchw"}, "has the unknown key `laoyut`"),
        ({"layout": "chw"}, "`layout` in"),
        ({"size": [32]}, "`size` in"),
        ({"size": [0, 32]}, "`size` in"),
        ({"scale": "fast"}, "`scale` in"),
        ({"scale": "1/0"}, "`scale` in"),
        ({"std": [0.5, 0, 0.5]}, "not 0"),
        ({"mean": [0.5, 0.5]}, "`mean` in"),
        ({"dtype": "complex64"}, "`dtype` in"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_wrong_description_names_file_and_key(tmp_path, data, said):
    with pytest.raises(QhubError) as caught:
        own(tmp_path, **data)
    assert said in caught.value.message
    assert str(tmp_path / "preprocess.json") in caught.value.message


def test_a_description_that_is_no_json_is_an_error(tmp_path):
    (tmp_path / "preprocess.json").write_text("{")
    with pytest.raises(QhubError, match="cannot be read"):
        find_preprocessor(tmp_path, "image")


def test_a_given_file_that_does_not_exist_is_a_wrong_argument(tmp_path):
    with pytest.raises(UsageError, match=r"mine\.json` does not exist"):
        find_preprocessor(tmp_path, "image", given=tmp_path / "mine.json")


def test_pictures_for_a_model_that_says_nothing_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(QhubError, match="nothing says how the model wants it") as caught:
        find_preprocessor(tmp_path, "image").batch([picture()])
    assert "preprocess.json" in caught.value.hint


def test_whole_numbers_that_are_no_pictures_pass_without_a_description(tmp_path):
    ids = np.arange(6).reshape(2, 3)
    assert np.array_equal(find_preprocessor(tmp_path, "array", inputs=("input_ids",)).batch(list(ids))["input_ids"], ids)


def test_whole_numbers_that_are_no_pictures_are_scaled_by_a_description(tmp_path):
    save(tmp_path, preprocess={"layout": "nhwc", "scale": 0.5})
    batch = find_preprocessor(tmp_path, "array").batch([np.array([[2, 4]], np.int8)])
    assert batch["x"].tolist() == [[[1.0, 2.0]]]


# Single steps.


def test_the_shorter_side_is_asked_for_and_the_longer_rounded_down():
    assert shortest_edge((100, 333), 50) == (50, 166)
    assert shortest_edge((333, 100), 50) == (166, 50)
    assert shortest_edge((100, 400), 50, longest=100) == (25, 100)


def test_a_crop_beyond_the_picture_is_black_around_it():
    cropped = center_crop(np.full((2, 2, 1), 7, np.uint8), (4, 3))
    assert cropped[:, :, 0].tolist() == [[0, 0, 0], [0, 7, 7], [0, 7, 7], [0, 0, 0]]


def test_the_steps_change_nothing_that_was_given():
    pixels = picture()
    before = pixels.copy()
    ImageSteps(resize=Resize(size=(8, 8)), scale=1 / 255, mean=(0.5,), std=(0.5,)).batch([pixels])
    assert np.array_equal(pixels, before)


# Texts.


@pytest.fixture
def model_folder(tmp_path):
    """A tokenizer of words with BERT's marks, and a model that takes at most 6 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "wr", "##ote"]
    tokens = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokens.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens.save(str(tmp_path / "tokenizer.json"))
    return save(
        tmp_path,
        config={"type_vocab_size": 2, "max_position_embeddings": 6, "model_type": "bert"},
        tokenizer_config={"pad_token": "[PAD]", "model_max_length": 1000000000000000019884624838656},
    )


def test_texts_are_padded_to_the_longest_of_the_batch(model_folder):
    batch = find_preprocessor(model_folder, "text").batch(["a", "a b c"])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].dtype == np.int64


def test_texts_are_cut_at_the_models_limit(model_folder):
    assert find_preprocessor(model_folder, "text").batch(["a b c a b c a b c"])["input_ids"].tolist() == [[2, 4, 5, 6, 4, 3]]


def test_pairs_have_types(model_folder):
    assert find_preprocessor(model_folder, "text").batch([("a", "b")])["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_only_what_the_model_takes_is_given(model_folder):
    assert list(find_preprocessor(model_folder, "text", inputs=("input_ids",)).batch(["a"])) == ["input_ids"]
    save(model_folder, config={"max_position_embeddings": 6})
    assert list(find_preprocessor(model_folder, "text").batch(["a"])) == ["input_ids", "attention_mask"]


def test_an_input_that_no_tokenizer_gives_is_an_error(model_folder):
    with pytest.raises(QhubError, match="takes `pixel_values`"):
        find_preprocessor(model_folder, "text", inputs=("pixel_values",))


def test_positions_that_begin_after_the_padding_id_count_less(model_folder):
    save(model_folder, config={"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1})
    assert load_text_steps(model_folder).limit == 512


def test_tags_stand_at_the_first_token_of_their_word(model_folder):
    steps = load_text_steps(model_folder)
    items = [TaggedWords(("a", "wrote"), (1, 2)), TaggedWords(("a",), (1,))]
    assert steps.batch(items)["input_ids"].tolist() == [[2, 4, 7, 8, 3], [2, 4, 3, 0, 0]]
    assert steps.word_labels(items).tolist() == [[IGNORED, 1, 2, IGNORED, IGNORED], [IGNORED, 1, IGNORED, IGNORED, IGNORED]]


def test_a_model_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(QhubError, match=r"has no tokenizer\.json"):
        find_preprocessor(tmp_path, "text")


def test_a_broken_tokenizer_is_an_error(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QhubError, match="is not a tokenizer"):
        find_preprocessor(tmp_path, "text")


def test_ids_are_those_of_transformers(model_folder):
    transformers = pytest.importorskip("transformers")
    save(model_folder, tokenizer_config={"pad_token": "[PAD]", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 6})
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    texts = ["a b", "c wrote b a c b", ""]
    expected = theirs(texts, padding=True, truncation=True, return_tensors="np")
    ours = find_preprocessor(model_folder, "text").batch(texts)
    assert {"input_ids", "attention_mask"} <= set(expected)
    for name, values in expected.items():
        assert np.array_equal(values, ours[name])


# Sounds.


def sound(samples, rate=16_000):
    return Sound(np.asarray(samples, np.float32), rate)


def test_sounds_by_a_description_are_cut_and_filled_with_silence(tmp_path):
    save(tmp_path, preprocess={"input": "wave", "sampling_rate": 16_000, "samples": 3})
    batch = find_preprocessor(tmp_path, "audio").batch([sound([1, 1, 1, 1]), sound([1])])
    assert batch["wave"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_sounds_by_the_models_feature_extractor(tmp_path):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True)
    extractor.save_pretrained(tmp_path)
    waves = [np.sin(np.arange(count) / 7).astype(np.float32) for count in (900, 500)]
    expected = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="np")["input_values"]
    batch = find_preprocessor(tmp_path, "audio").batch([sound(wave) for wave in waves])
    assert np.array_equal(batch["input_values"], expected)


def test_a_model_that_does_not_say_how_it_takes_sound_is_an_error(tmp_path):
    with pytest.raises(QhubError, match="does not say how it takes sound") as caught:
        find_preprocessor(tmp_path, "audio")
    assert "sampling_rate" in caught.value.hint


def test_another_rate_without_scipy_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    save(tmp_path, preprocess={"sampling_rate": 16_000, "samples": 3})
    with pytest.raises(QhubError) as caught:
        find_preprocessor(tmp_path, "audio").batch([sound([0, 0, 0]), sound([0, 0], 8000)])
    assert caught.value.message == "item 1 has 8000 samples per second, the model takes 16000, and resampling needs scipy"
    assert "ffmpeg" in caught.value.hint


def test_another_rate_is_resampled_where_scipy_is(tmp_path):
    pytest.importorskip("scipy.signal")
    save(tmp_path, preprocess={"sampling_rate": 16_000})
    slow = np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    (fast,) = find_preprocessor(tmp_path, "audio").batch([sound(slow, 8000)])["x"]
    expected = np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    assert len(fast) == 8000
    np.testing.assert_allclose(fast[500:-500], expected[500:-500], atol=0.01)


# Batches of a model's inputs: what does not fit names its file or row.


@pytest.fixture
def arrays(tmp_path):
    def arrays(x, y=None):
        path = tmp_path / "data.npz"
        np.savez(path, x=x, **({} if y is None else {"y": y}))
        return read_data(path)

    return arrays


def test_batches_come_with_their_labels(arrays):
    data = arrays(np.arange(10, dtype=np.float32).reshape(5, 2), np.array([0, 1, 0, 1, 1]))
    batches = list(model_inputs(data, find_preprocessor(data.reader.path, "array"), 2, {"x": (None, 2)}))
    assert [(inputs["x"].shape, labels.tolist()) for inputs, labels in batches] == [((2, 2), [0, 1]), ((2, 2), [0, 1]), ((1, 2), [1])]


def test_images_of_the_wrong_size_name_the_file_and_how_to_resize(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(picture(40, 32)).save(tmp_path / "a.png")
    steps = own(tmp_path, layout="nchw")
    with pytest.raises(QhubError) as caught:
        list(model_inputs(read_data(tmp_path), steps, 8, {"x": (None, 3, 32, 32)}))
    assert caught.value.message == f"`{tmp_path / 'a.png'}` gives (3, 40, 32) for `x`; the model takes (3, 32, 32)"
    assert caught.value.hint == 'resize them: set "size": [32, 32] in preprocess.json beside the model'


def test_channels_that_lie_elsewhere_are_told_from_a_wrong_size(arrays):
    data = arrays(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(QhubError, match=r"gives \(32, 32, 3\)") as caught:
        list(model_inputs(data, find_preprocessor(data.reader.path, "array"), 8, {"x": ("batch", 3, 32, 32)}))
    assert '"layout"' in caught.value.hint


def test_images_of_different_sizes_name_the_first_that_differs(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, height in (("a", 8), ("b", 8), ("c", 9)):
        image.fromarray(picture(height, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(QhubError, match=r"c\.png` gives the shape \(3, 9, 8\), `.*a\.png` \(3, 8, 8\)"):
        list(model_inputs(read_data(tmp_path), own(tmp_path), 8))


def test_an_input_of_another_name_is_said(arrays):
    data = arrays(np.zeros((2, 3), np.float32))
    with pytest.raises(QhubError, match="the model takes `image`; the data gives x"):
        list(model_inputs(data, find_preprocessor(data.reader.path, "array"), 2, {"image": (None, 3)}))


# Labels and the model's classes.


def test_labels_out_of_range_name_the_first_row(arrays):
    data = arrays(np.zeros((4, 2)), np.array([0, 1, 10, -1]))
    with pytest.raises(QhubError) as caught:
        fit_labels(data, 10)
    assert caught.value.message.startswith("row 2 of `")
    assert caught.value.message.endswith("has the label `10`; the model has 10 classes, 0 to 9 (2 of 4 labels are outside)")


def test_names_become_the_models_ids_in_its_order(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,cat\nb,Dog\n")
    found = fit_labels(read_data(tmp_path / "a.csv"), 3, ["dog", "bee", "cat"])
    assert (found.labels.tolist(), found.class_names) == ([2, 0], ("dog", "bee", "cat"))


def test_names_that_the_model_does_not_have_keep_their_ids(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,cat\nb,dog\n")
    assert fit_labels(read_data(tmp_path / "a.csv"), 2, ["LABEL_0", "LABEL_1"]).labels.tolist() == [0, 1]


def test_data_without_labels_fit_any_model(arrays):
    assert fit_labels(arrays(np.zeros((2, 2))), 5).labels is None


TAGGED = '{"tokens": ["Ada", "wrote"], "tags": ["PER", "O"]}\n{"tokens": ["Hi"], "tags": ["O"]}\n'


def test_tags_become_the_models_ids_in_its_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(TAGGED)
    found = fit_labels(read_data(tmp_path / "a.jsonl"), 3, ["LOC", "PER", "O"])
    assert [item.tags for item in found.items(0, 2)] == [(1, 2), (2,)]
    assert found.class_names == ("LOC", "PER", "O")


def test_tags_out_of_range_name_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["Hi"], "tags": [0]}\n{"tokens": ["Ada", "wrote"], "tags": [0, 7]}\n')
    with pytest.raises(QhubError, match=r"line 2 of `.*a\.jsonl` has the label `7`; the model has 3 classes"):
        fit_labels(read_data(tmp_path / "a.jsonl"), 3)
