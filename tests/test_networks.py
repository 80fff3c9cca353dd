"""Runs whose model is a network: planned from data, quantized, measured and reported; with and without files of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qhub import feeding, pipeline
from qhub.errors import QhubError, UsageError
from qhub.events import Events
from qhub.graph.store import QuantizedGraph
from qhub.pipeline import RunRequest
from qhub.plugins import Plugins
from qhub.prove.network import compare
from qhub.types import ModelSource

demo = pytest.importorskip("qhub_demo.plugin", reason="qhub-demo is not installed")
pytest.importorskip("qhub_ptq", reason="qhub-ptq is not installed")

MODULE = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
"""


@pytest.fixture(scope="module")
def plugins():
    return Plugins.load()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own with its weights, and labelled arrays that it takes."""
    (tmp_path / "smallnet.py").write_text(MODULE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    random = np.random.default_rng(0)
    x = random.standard_normal((40, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(-1).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(own: Path, **changes: object) -> RunRequest:
    given = {
        "model": "smallnet:small",
        "weights": own / "small.safetensors",
        "calib": str(own / "data.npz"),
        "eval": str(own / "data.npz"),
        "plugins": ("ptq",),
        "out": own / "run",
    }
    return RunRequest(**{**given, **changes})


def test_a_module_of_the_users_own_is_quantized_and_measured(own, plugins):
    plan = pipeline.plan(request(own), plugins)
    assert (plan.profile.task, plan.recipe.scheme) == ("vision", "w8a8-static")
    report = pipeline.run(plan, plugins, Events())
    assert report.metric == "accuracy"
    assert report.float_model.accuracy == 1.0, "its own answers are the labels"
    assert report.quantized.accuracy > 0.9
    assert report.quantized.cosine > 0.99
    assert 8.0 < report.quantized.bits_per_weight < 9.0
    model = QuantizedGraph.open(own / "run" / "quantized")
    assert dict(model.schemes) == {"0": "w8a16", "3": "w8a16"}
    assert report.to_json()["quantized"]["bytes"] == model.program.stat().st_size


def test_the_same_recipe_gives_the_same_codes(own, plugins):
    for name in ("one", "two"):
        pipeline.run(pipeline.plan(request(own, out=own / name), plugins), plugins, Events())
    one, two = (QuantizedGraph.open(own / name / "quantized") for name in ("one", "two"))
    assert one.metadata == two.metadata
    for layer, codes in one.layers().items():
        assert codes.equals(two.layers()[layer])


def test_a_recipe_of_a_network_is_repeated(own, plugins):
    pipeline.run(pipeline.plan(request(own), plugins), plugins, Events())
    again = pipeline.plan(RunRequest(recipe=own / "run" / "recipe.yaml", out=own / "again"), plugins)
    assert again.recipe.calibration == pipeline.read_recipe(own / "run" / "recipe.yaml").calibration
    report = pipeline.run(again, plugins, Events())
    assert report.quantized.accuracy > 0.9


def test_eval_measures_a_network_beside_its_float_one(own, plugins):
    report = pipeline.run(pipeline.plan(request(own), plugins), plugins, Events())
    found = pipeline.evaluate(own / "run", plugins, Events(), None)
    assert (found["metric"], found["items"], found["float"]["accuracy"]) == ("accuracy", 40, 1.0)
    assert found["accuracy"] == report.quantized.accuracy
    elsewhere = (own / "run" / "quantized").rename(own / "moved")
    alone = pipeline.evaluate(elsewhere, plugins, Events(), str(own / "data.npz"))
    assert alone["accuracy"] == report.quantized.accuracy
    assert "float" not in alone
    with pytest.raises(UsageError, match="brings no evaluation data"):
        pipeline.evaluate(elsewhere, plugins, Events(), None)


def test_a_layer_can_stay_float(own, plugins):
    plan = pipeline.plan(request(own, overrides=("3=float",)), plugins)
    pipeline.run(plan, plugins, Events())
    metadata = json.loads((own / "run" / "quantized" / "qhub.json").read_text())
    assert list(metadata["layers"]) == ["0"]
    assert metadata["float_layers"] == ["3"]


def test_data_unlike_the_calibration_data_are_said(own, plugins):
    found = np.load(own / "data.npz")
    np.savez(own / "far.npz", x=found["x"] * 100, y=found["y"])
    plan = pipeline.plan(request(own, eval=str(own / "far.npz")), plugins)
    report = pipeline.run(plan, plugins, Events())
    assert any("was calibrated on" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "smallnet:large"}, "`smallnet:large` cannot be imported"),
        ({"model": "nowhere:small"}, "`nowhere:small` cannot be imported"),
        ({"model": "no function"}, "is no function of a module"),
    ],
    ids=["a function that is not there", "a module that is not there", "not a function's name"],
)
def test_a_function_that_makes_no_model_is_one_clear_error(own, plugins, changes, message):
    with pytest.raises(UsageError, match=message):
        pipeline.run(pipeline.plan(request(own, **changes), plugins), plugins, Events())


def test_weights_that_do_not_fit_are_one_clear_error(own, plugins):
    save_file({"0.weight": torch.zeros(4, 3, 3, 3)}, own / "small.safetensors")
    with pytest.raises(QhubError, match="do not fit `smallnet:small`"):
        pipeline.run(pipeline.plan(request(own), plugins), plugins, Events())
    assert not (own / "run").exists(), "nothing half-written is left"


def test_a_pickle_of_weights_is_refused(own, plugins):
    with pytest.raises(QhubError, match="pickle"):
        pipeline.plan(request(own, weights=own / "small.pth"), plugins)


def test_a_network_without_data_asks_for_them(own, plugins):
    with pytest.raises(UsageError, match="brings no calibration data"):
        pipeline.plan(request(own, calib=None), plugins)


@pytest.mark.parametrize("option", ["calib", "eval"])
def test_data_of_the_wrong_size_are_refused_before_work(own, plugins, option):
    np.savez(own / "wide.npz", x=np.zeros((4, 3, 8, 9), np.float32), y=np.zeros(4, np.int64))
    with pytest.raises(QhubError, match=r"the model takes|cannot be exported"):
        pipeline.run(pipeline.plan(request(own, **{option: str(own / "wide.npz")}), plugins), plugins, Events())
    assert not (own / "run").exists()


def test_labels_that_the_network_has_no_class_for_are_refused_before_work(own, plugins):
    np.savez(own / "labels.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.array([0, 1, 2, 3]))
    with pytest.raises(QhubError, match="has the label `3`; the model has 3 classes"):
        pipeline.run(pipeline.plan(request(own, eval=str(own / "labels.npz")), plugins), plugins, Events())
    assert not (own / "run").exists()


def test_nan_in_the_data_is_named(own, plugins):
    found = np.load(own / "data.npz")
    bad = found["x"].copy()
    bad[0, 0, 0, 0] = np.nan
    np.savez(own / "bad.npz", x=bad, y=found["y"])
    with pytest.raises(QhubError, match="NaN"):
        pipeline.plan(request(own, calib=str(own / "bad.npz")), plugins)


def test_a_demo_network_brings_its_own_data(plugins):
    calibration, evaluation = feeding.data_of_run(plugins.models["demo:vision"], (None, None), plugins)
    assert Path(calibration).name == "calibration.npz"
    assert Path(evaluation).name == "heldout.npz"


def test_data_beside_a_model_are_its_own(tmp_path, plugins):
    for name in ("calibration.npz", "heldout.npz"):
        np.savez(tmp_path / name, x=np.zeros((2, 3)))
    found = feeding.data_of_run(ModelSource("mine", tmp_path, ""), (None, None), plugins)
    assert found == (str(tmp_path / "calibration.npz"), str(tmp_path / "heldout.npz"))


def test_accuracy_counts_right_answers():
    expected = np.eye(4, dtype=np.float32) * 5
    found = expected[[0, 1, 3, 3]]
    made = compare([(expected, found)], iter([np.array([0, 1, 2, 3])]), embedding=False)
    assert (made.metric, made.float_figures.accuracy, made.figures.accuracy) == ("accuracy", 1.0, 0.75)
    assert made.figures.top1_agreement == 0.75
    assert made.figures.kl > 0
    assert made.drop_pct == pytest.approx(25.0)


def test_without_labels_the_float_network_is_right():
    expected = np.eye(4, dtype=np.float32)
    made = compare([(expected, expected * 0.9)], None, embedding=False)
    assert (made.metric, made.figures.accuracy, made.drop_pct) == ("agreement", 1.0, 0.0)


def test_embeddings_are_compared_by_their_angle():
    expected = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = np.array([[2.0, 0.0], [1.0, 1.0]])
    made = compare([(expected, found)], None, embedding=True)
    assert (made.metric, made.float_figures.accuracy) == ("cosine", 1.0)
    assert made.figures.accuracy == pytest.approx((1 + 0.5**0.5) / 2)


def test_tokens_without_a_label_do_not_count():
    expected = np.zeros((1, 3, 2))
    expected[..., 1] = 1.0
    found = expected.copy()
    found[0, 2] = [1.0, 0.0]
    made = compare([(expected, found)], iter([np.array([[1, 1, feeding.NEITHER]])]), embedding=False)
    assert (made.float_figures.accuracy, made.figures.accuracy) == (1.0, 1.0)
