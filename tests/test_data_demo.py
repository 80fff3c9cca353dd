"""The whole way in: the demo models predict held-out data that was read and preprocessed here."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from qhub.data.classes import fit_labels
from qhub.data.preprocess import find_preprocessor, model_inputs
from qhub.data.ranges import collect_ranges, compare_ranges
from qhub.data.read import read_data

HEADS = {"demo:vision": "AutoModelForImageClassification", "demo:text": "AutoModelForSequenceClassification"}


@pytest.fixture(params=HEADS)
def source(request):
    plugin = pytest.importorskip("qhub_demo.plugin")
    return next(model for model in plugin.qhub_models() if model.name == request.param)


@pytest.fixture
def model(source):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, HEADS[source.name]).from_pretrained(source.path, local_files_only=True).eval()


def test_held_out_data_are_predicted(source, model):
    torch = importlib.import_module("torch")
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    data = fit_labels(read_data(source.evaluation, samples=300, seed=0), len(names), names)
    hits = []
    with torch.no_grad():
        for inputs, labels in model_inputs(data, find_preprocessor(source.path, data.kind), 50):
            logits = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
            hits.append(logits.argmax(-1).numpy() == labels)
    assert np.concatenate(hits).mean() > 0.8


def test_calibration_feeds_what_evaluation_feeds(source):
    sides = []
    for path in (source.calibration, source.evaluation):
        data = read_data(path, samples=200, seed=0)
        sides.append(collect_ranges(inputs for inputs, _ in model_inputs(data, find_preprocessor(source.path, data.kind), 50)))
    assert compare_ranges(*sides) == []
    assert list(sides[0]) == (["pixel_values"] if source.name == "demo:vision" else [])
