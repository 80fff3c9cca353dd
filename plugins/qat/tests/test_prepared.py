"""What a prepared network computes is what its quantized form computes; and a training loop of one's own."""

import json

import numpy as np
import pytest
import qhub_qat
import torch
from qat_networks import pictures, trained
from qhub_qat import finish, prepare, save

from qhub import QhubError, Recipe, UsageError
from qhub.graph.store import QuantizedGraph

SCHEMES = ["w8a8-static", "w4a8-static", "w4a4-static"]


def recipe(**facts):
    return Recipe("m", "m", "", "host", "qat", "w4a4-static", **facts)


def train(prepared, x, *, steps=3):
    """A loop of the user's own: towards the float network, by plain gradient descent."""
    images = torch.from_numpy(x)
    wanted = trained()(images).detach()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = (prepared(images) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_rounded_program_gives_what_the_trained_module_gives(scheme):
    x, _ = pictures(64)
    prepared = prepare(trained(), {"x": x}, scheme)
    train(prepared, x)
    result = finish(prepared)
    rounded = result.graph.rounded(result.quantization)
    with torch.no_grad():
        made = prepared(torch.from_numpy(x))
    torch.testing.assert_close(rounded.run({"x": x})[0], made, rtol=1e-5, atol=1e-5)


def test_training_brings_the_rounded_network_closer_to_the_float_one():
    x, _ = pictures(64)
    losses = train(prepare(trained(), {"x": x}, recipe(options={"qat": {"edges": "same"}})), x, steps=60)
    assert min(losses[-5:]) < 0.5 * losses[0]


def test_everything_that_matters_is_trained():
    x, _ = pictures(32)
    prepared = prepare(trained(), {"x": x}, "w4a4-static")
    prepared(torch.from_numpy(x)).square().sum().backward()
    grown = {name for name, parameter in prepared.named_parameters() if parameter.grad is not None and bool(parameter.grad.abs().sum())}
    assert {f"network.{name}" for name in ("conv1.weight", "conv1.bias", "conv2.weight", "linear.weight", "linear.bias")} <= grown
    assert len(prepared.scales()) == 3 + len(prepared.activation_steps)
    assert not any("bn" in name for name, _ in prepared.named_parameters())


def test_it_is_called_as_the_module_is_by_place_or_by_name():
    x, _ = pictures(4)
    prepared, images = prepare(trained(), {"x": x}, "w8a8-static"), torch.from_numpy(x)
    assert torch.equal(prepared(images), prepared(x=images))
    assert prepared(images[:3]).shape == (3, 4)


def test_the_module_itself_stays_as_it_was():
    x, _ = pictures(32)
    before = {name: value.clone() for name, value in trained().state_dict().items()}
    train(prepare(trained(), {"x": x}, "w4a4-static"), x)
    assert all(torch.equal(value, before[name]) for name, value in trained().state_dict().items())


def test_codes_are_symmetric_and_never_the_lowest():
    x, _ = pictures(32)
    prepared = prepare(trained(), {"x": x}, "w4a4-static")
    train(prepared, x)
    for layer, codes in finish(prepared).quantization.weights.items():
        bits = 4 if layer == "conv2" else 8
        assert (codes.bits, codes.symmetric) == (bits, True)
        assert int(codes.codes.min()) >= 1
        assert int(codes.codes.max()) <= 2**bits - 1
        assert (codes.scale.dtype, codes.scale.shape) == (torch.float32, (len(codes.codes), 1))
        assert bool((codes.scale > 0).all())


@pytest.mark.parametrize(
    ("facts", "bits"),
    [
        ({}, {"conv1": 8, "conv2": 4, "linear": 8}),
        ({"options": {"qat": {"edges": "same"}}}, {"conv1": 4, "conv2": 4, "linear": 4}),
        ({"overrides": {"conv1": "w4a8-static"}}, {"conv1": 4, "conv2": 4, "linear": 8}),
        ({"overrides": {"conv1": "float", "conv2": "w8a8-static"}}, {"conv2": 8, "linear": 8}),
    ],
    ids=["first and last at 8 bits", "all the same", "an override of the first", "one stays float"],
)
def test_the_recipe_decides_the_bits_of_each_layer(facts, bits):
    x, _ = pictures(16)
    result = finish(prepare(trained(), {"x": x}, recipe(**facts)))
    assert {layer: codes.bits for layer, codes in result.quantization.weights.items()} == bits


def test_a_relu_has_its_zero_at_code_zero():
    x, _ = pictures(32)
    grids = finish(prepare(trained(), {"x": x}, "w4a4-static")).quantization.activations
    assert {tensor: grid.zero for tensor, grid in grids.items() if tensor.startswith("relu")} == {"relu": 0, "relu_1": 0}
    assert grids["x"].bits == 8
    assert grids["relu"].bits == 4


def test_a_saved_model_is_a_quantized_model(tmp_path):
    x, _ = pictures(32)
    prepared = prepare(trained(), {"x": x}, "w4a4-static")
    train(prepared, x)
    folder = save(prepared, tmp_path / "quantized")
    model = QuantizedGraph.open(folder)
    assert json.loads((folder / "qhub.json").read_text())["method"] == "qat"
    wanted = finish(prepared).quantization.weights
    found = model.layers()
    assert all(found[layer].equals(codes) for layer, codes in wanted.items())
    with torch.no_grad():
        torch.testing.assert_close(model.graph().run({"x": x})[0], prepared(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="is not empty"):
        save(prepare(trained(), {"x": pictures(8)[0]}, "w8a8-static"), tmp_path)


def test_a_scheme_without_rounded_activations_is_refused():
    with pytest.raises(UsageError, match="`qat` does not write scheme `w4a16-g128-asym`"):
        prepare(trained(), {"x": pictures(8)[0]}, "w4a16-g128-asym")


def test_a_network_that_stays_float_altogether_is_refused():
    with pytest.raises(QhubError, match="no layer to quantize"):
        prepare(trained(), {"x": pictures(8)[0]}, recipe(overrides={"*": "float"}))


def test_inputs_that_are_not_finite_are_refused():
    x = np.full((4, 3, 8, 8), np.nan, dtype=np.float32)
    with pytest.raises(QhubError, match="tensor `x` of the float network holds numbers that are not finite"):
        prepare(trained(), {"x": x}, "w8a8-static")


def test_the_module_offers_three_functions_and_nothing_else():
    assert sorted(qhub_qat.__all__) == ["finish", "prepare", "save"]
    with pytest.raises(AttributeError, match="has no attribute `fit`"):
        qhub_qat.fit  # noqa: B018
