"""The rounds of training: what they bring, when they end, and that an interruption changes nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from qat_networks import job_for, pictures
from qhub_qat.checkpoint import FILE
from qhub_qat.items import Items, augmentation, moved
from qhub_qat.options import DEFAULTS, Settings
from qhub_qat.plugin import Qat
from qhub_qat.quantize import adjusted
from qhub_qat.train import Round

from qhub import GraphInput, QhubError, Scheme, Unsupported, UsageError
from qhub.testing.declared import example_profile

FAST = {"epochs": 3, "lr": 1e-3, "batch": 16, "rounds": 1, "edges": "same"}


def told_distances(told):
    """What the epochs said of the distance from the float network."""
    return [float(line[2].split(": ")[1].split()[0]) for line in told if isinstance(line, tuple)]


def same(one, other):
    """Whether two results hold the same codes, grids and biases."""
    left, right = one.quantization, other.quantization
    codes = all(left.weights[layer].equals(right.weights[layer]) for layer in left.weights)
    biases = all(torch.equal(one.graph.bias(layer), other.graph.bias(layer)) for layer in left.weights)
    return codes and biases and left.activations == right.activations and one.notes == other.notes


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_training_comes_closer_to_the_float_network(tmp_path, labels):
    job, told = job_for(tmp_path, labels=labels)
    Qat(**{**FAST, "epochs": 8, "patience": 8}).quantize_graph(job)
    distances = told_distances(told)
    assert len(distances) == 8
    assert min(distances) < 0.7 * distances[0]


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    job, told = job_for(tmp_path)
    result = Qat(**{**FAST, "epochs": 6, "lr": 0.5}).quantize_graph(job)  # a rate that ruins the network
    assert min(told_distances(told)) > 0.2
    x = next(job.calibration())
    moved_by = float((result.graph.rounded(result.quantization).run(x)[0] - job.graph.run(x)[0]).abs().mean())
    assert moved_by < 0.3, "what training began with was better than any epoch"


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    results = [Qat(**FAST).quantize_graph(job_for(tmp_path / name, seed=seed)[0]) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Killed(BaseException):
    """In place of kill -9: nothing in between catches it."""


@pytest.mark.parametrize("epoch", [1, 2, 4], ids=lambda epoch: f"after {epoch} epochs")
def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path, epoch):
    options = {**FAST, "rounds": 2}
    whole = Qat(**options).quantize_graph(job_for(tmp_path / "whole", max_drop_pct=-1000.0)[0])
    finished = []

    def stop(*told):
        finished.append(told)
        if len(finished) == epoch:
            raise Killed

    with pytest.raises(Killed):
        Qat(**options).quantize_graph(job_for(tmp_path / "part", max_drop_pct=-1000.0, progress=stop)[0])
    job, told = job_for(tmp_path / "part", max_drop_pct=-1000.0)
    assert same(Qat(**options).quantize_graph(job), whole)
    assert len(told_distances(told)) == 6 - epoch, "finished epochs are not done again"


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None], ids=["empty", "no safetensors", "cut off"])
def test_a_damaged_checkpoint_only_costs_time(tmp_path, damage):
    whole = Qat(**FAST).quantize_graph(job_for(tmp_path)[0])
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    job, told = job_for(tmp_path)
    assert same(Qat(**FAST).quantize_graph(job), whole)
    assert len(told_distances(told)) == 3


def test_a_checkpoint_of_other_options_is_not_taken(tmp_path):
    Qat(**FAST).quantize_graph(job_for(tmp_path)[0])
    job, told = job_for(tmp_path)
    Qat(**{**FAST, "lr": 2e-3}).quantize_graph(job)
    assert len(told_distances(told)) == 3


def test_rounds_go_on_with_other_parameters_until_their_number_is_reached(tmp_path):
    job, told = job_for(tmp_path, max_drop_pct=-1000.0)
    result = Qat(**{**FAST, "rounds": 3, "epochs": 1}).quantize_graph(job)
    questions = [line for line in told if isinstance(line, str)]
    assert [line.split(" (")[0] for line in questions] == [f"round {number} of training: accuracy valid? no" for number in (1, 2, 3)]
    assert [line[1] for line in told if isinstance(line, tuple)] == [1, 1, 2, 2]
    assert result.notes["training"].count("lost") == 3


def test_one_round_is_enough_where_the_goal_is_met(tmp_path):
    job, told = job_for(tmp_path, max_drop_pct=50.0)
    Qat(**{**FAST, "rounds": 3}).quantize_graph(job)
    (question,) = (line for line in told if isinstance(line, str))
    assert question.startswith("round 1 of training: accuracy valid? yes")


def test_each_round_changes_the_parameters():
    base = Round(0, 1e-3, 10, 0.1)
    assert [adjusted(base, index) for index in range(4)] == [
        Round(0, 1e-3, 10, 0.1),
        Round(1, pytest.approx(1e-3 / 3), 10, 0.0),
        Round(2, 2e-3, 20, 0.1),
        Round(3, 1e-3, 10, 0.1),
    ]


def test_a_round_ends_early_when_nothing_improves(tmp_path):
    job, told = job_for(tmp_path)
    Qat(**{**FAST, "epochs": 20, "lr": 0.5, "patience": 2}).quantize_graph(job)
    assert len(told_distances(told)) == 2


def test_first_and_last_layer_are_said_to_have_8_bits(tmp_path):
    result = Qat(**{**FAST, "epochs": 1, "edges": "int8"}).quantize_graph(job_for(tmp_path)[0])
    assert {layer: codes.bits for layer, codes in result.quantization.weights.items()} == {"conv1": 8, "conv2": 4, "linear": 8}
    assert all("8 bits" in result.notes[layer] for layer in ("conv1", "linear"))
    assert "conv2" not in result.notes


def test_an_override_keeps_a_layer_in_float(tmp_path):
    job, _ = job_for(tmp_path, overrides={"conv2": None, "linear": Scheme.parse("w4a8-static")})
    result = Qat(**{**FAST, "epochs": 1, "edges": "int8"}).quantize_graph(job)
    assert {layer: codes.bits for layer, codes in result.quantization.weights.items()} == {"conv1": 8, "linear": 4}


def test_no_file_is_half_written(tmp_path):
    Qat(**{**FAST, "epochs": 1}).quantize_graph(job_for(tmp_path)[0])
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_graph_that_is_no_program_is_refused(tmp_path):
    job, _ = job_for(tmp_path)
    with pytest.raises(Unsupported, match="trains programs and modules") as error:
        Qat(**FAST).quantize_graph(dataclasses.replace(job, graph=object()))
    assert "--no-retrain" in error.value.hint


@pytest.mark.parametrize(
    ("facts", "scheme", "why"),
    [
        ({"task": "llm"}, "w8a8-static", "language models"),
        ({"task": "vision", "format": "onnx"}, "w8a8-static", "an ONNX file cannot be trained"),
        ({"task": "vision"}, "w8a8-dynamic", "`qat` does not write scheme `w8a8-dynamic`"),
        ({"task": "vision"}, "w4a4-static", None),
    ],
    ids=["a language model", "an ONNX file", "rounded row by row", "what it can do"],
)
def test_what_it_cannot_train_is_said_before_any_work(facts, scheme, why):
    said = Qat().reject(dataclasses.replace(example_profile(), **facts), Scheme.parse(scheme))
    assert said is None if why is None else why in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("epochs", 2.5), ("lr", -1), ("rounds", True), ("augment", "on"), ("edges", 8), ("held", 0.9), ("labels", "all")],
    ids=lambda value: str(value),
)
def test_an_option_with_a_wrong_value_is_a_usage_error(name, value):
    with pytest.raises(UsageError, match=f"option `{name}` of `qat` is `{value}`") as error:
        Qat(**{name: value})
    assert error.value.hint.startswith("it takes ")


def test_every_option_has_a_default_that_it_takes():
    assert Settings.of(DEFAULTS) == Settings()


@pytest.mark.parametrize(("share", "sizes"), [(0.1, (87, 9)), (0.5, (48, 48)), (0.0, (96, 96))], ids=["a tenth", "half", "none"])
def test_some_items_are_held_back(tmp_path, share, sizes):
    training, held = Items.of(job_for(tmp_path)[0]).split(share)
    assert (training.count, held.count) == sizes


def texts(lengths):
    """A job's worth of batches of texts, each of another length."""
    batches = [{"ids": np.full((4, length), length, dtype=np.int64)} for length in lengths]
    return batches, [np.arange(4)] * len(batches)


def test_texts_of_several_lengths_stay_in_their_batches(tmp_path):
    batches, labels = texts([5, 7, 7, 9])
    job, _ = job_for(tmp_path)
    graph = dataclasses.make_dataclass("G", ["inputs"])((GraphInput("ids", (-1, -1), "int64"),))
    items = Items.of(dataclasses.replace(job, graph=graph, calibration=lambda: iter(batches), labels=lambda: iter(labels)))
    assert (len(items.parts), items.count) == (4, 16)
    drawn = list(items.batches(3, torch.Generator().manual_seed(0)))
    assert sum(len(inputs[0]) for inputs, _ in drawn) == 16
    assert all(inputs[0].unique().numel() == 1 for inputs, _ in drawn)
    training, held = items.split(0.1)
    assert (training.count, held.count) == (12, 4)


def test_labels_stay_with_their_items(tmp_path):
    items = Items.of(job_for(tmp_path)[0])
    x, y = pictures(96, seed=1)
    of = {picture.tobytes(): int(label) for picture, label in zip(x, y, strict=True)}
    for inputs, labels in items.batches(16, torch.Generator().manual_seed(3)):
        assert [of[one.numpy().tobytes()] for one in inputs[0]] == labels.tolist()


def test_pictures_are_moved_and_mirrored_but_not_changed_otherwise():
    x = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16).repeat(64, 1, 1, 1)
    made = moved(x, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    rows = made[:, 0, 8]  # each row is a run of neighbours, forwards or backwards
    steps = (rows[:, 4:12].diff(dim=1)).unique()
    assert set(steps.tolist()) == {-1.0, 1.0}
    assert len({float(one) for one in made[:, 0, 8, 8]}) > 20
    assert torch.equal(made, moved(x, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("shape", "wanted", "changes"),
    [((3, 8, 8), "auto", True), ((1, 8, 8), "auto", True), ((3, 8, 8), "off", False), ((4, 8, 8), "auto", False), ((24,), "auto", False)],
    ids=["colour", "grey", "off", "four channels", "rows"],
)
def test_only_pictures_are_augmented(shape, wanted, changes):
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    made = augmentation(Items([([x], None)]), wanted)([x], torch.Generator().manual_seed(0))[0]
    assert torch.equal(made, x) is not changes


def test_nothing_to_quantize_is_an_error(tmp_path):
    with pytest.raises(QhubError, match="no layer to quantize"):
        Qat(**FAST).quantize_graph(job_for(tmp_path, scheme_of=lambda layer: None)[0])


@pytest.mark.parametrize(("scheme", "epochs"), [("w8a8-static", 4), ("w4a8-static", 10), ("w4a4-static", 10)])
def test_fewer_bits_are_trained_longer(tmp_path, scheme, epochs):
    job, told = job_for(tmp_path, scheme, count=32)
    Qat(rounds=1, patience=100).quantize_graph(job)
    assert told[0][:2] == (1, epochs)
