"""Networks as torch programs: simplified, watched, rewritten with quantize and dequantize, stored and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qhub.graph.placement import place
from qhub.graph.store import QuantizedGraph, copy_companions, is_graph, write_graph
from qhub.graph.torch_graph import TorchGraph
from qhub.graph.values import ActivationGrid, GraphInput, Quantization
from qhub.quantize.grid import minmax_grid, on_grid
from qhub.types import Scheme

PICTURE = (GraphInput("picture", (-1, 3, 8, 8), "float32"),)


class Small(nn.Module):
    """Convolution, batch norm, ReLU, a residual sum, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(picture)))
        x = torch.relu(self.second(x) + x)
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Small()
    made.norm.running_mean.normal_()
    made.norm.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    return made.eval()


@pytest.fixture
def graph(model):
    return TorchGraph.of(model, PICTURE, ("logits",))


@pytest.fixture
def batch():
    return {"picture": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}


def quantized(graph: TorchGraph, bits: int = 8) -> Quantization:
    scheme = Scheme(bits)
    weights = {}
    for op in graph.ops:
        if op.has_weight:
            rows = graph.weight(op.layer).reshape(len(graph.weight(op.layer)), -1)
            weights[op.layer] = on_grid(rows, minmax_grid(rows, scheme, torch.float32), scheme)
    points = place(graph.ops)
    grids = {point.tensor: ActivationGrid(6.0 / 255, 100) for point in points}
    return Quantization(weights, grids, {point.tensor: point.readers for point in points})


def test_batch_norms_are_folded_and_dropout_is_gone(model, graph, batch):
    assert [op.kind for op in graph.ops if op.kind == "norm"] == []
    expected = model(torch.from_numpy(batch["picture"]))
    torch.testing.assert_close(graph.run(batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert model.norm.training is False
    assert "first.bias" not in model.state_dict(), "the model itself is not changed"


def test_any_batch_is_taken(graph):
    for count in (1, 2, 5):
        assert graph.run({"picture": np.zeros((count, 3, 8, 8), np.float32)})[0].shape == (count, 5)


def test_operations_say_what_they_are(graph):
    kinds = {op.layer or op.name: op.kind for op in graph.ops}
    assert [kinds[name] for name in ("first", "second", "head")] == ["conv", "conv", "linear"]
    assert list(kinds.values()).count("join") == 1
    assert list(kinds.values()).count("clip") == 2


def test_watching_gives_the_tensors_that_were_asked_for(graph, batch):
    seen = dict(graph.watch(batch, ["picture", "relu"]))
    assert set(seen) == {"picture", "relu"}
    np.testing.assert_array_equal(seen["picture"].numpy(), batch["picture"])
    assert float(seen["relu"].min()) == 0.0


def test_other_weights_make_another_network(graph, batch):
    changed = graph.with_layers({"head": (torch.zeros(5, 4), torch.arange(5.0))})
    np.testing.assert_allclose(changed.run(batch)[0].numpy(), np.tile(np.arange(5.0), (3, 1)))
    assert not np.allclose(graph.run(batch)[0].numpy(), changed.run(batch)[0].numpy()), "the graph itself is not changed"


def test_a_layer_is_applied_with_another_weight(graph, batch):
    op = next(op for op in graph.ops if op.layer == "first")
    x = torch.from_numpy(batch["picture"])
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(graph.apply(op, weight.reshape(4, -1), x), nn.functional.conv2d(x, weight, padding=1))


def test_rounding_computes_with_dequantized_numbers(graph, batch):
    quantization = quantized(graph)
    rounded = graph.rounded(quantization)
    dequantized = graph.with_layers(
        {layer: (codes.dequantize().reshape(graph.weight(layer).shape), None) for layer, codes in quantization.weights.items()}
    )
    weights_only = graph.rounded(Quantization(quantization.weights))
    torch.testing.assert_close(weights_only.run(batch)[0], dequantized.run(batch)[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(rounded.run(batch)[0], weights_only.run(batch)[0]), "activations are rounded too"


def test_running_takes_short_cuts_that_change_nothing(graph, batch):
    rounded = graph.rounded(quantized(graph))
    with torch.no_grad():
        torch.testing.assert_close(rounded.run(batch)[0], rounded.module(torch.from_numpy(batch["picture"])), rtol=0, atol=0)


def test_a_dynamic_layer_rounds_each_row_on_a_grid_of_its_own(graph, batch):
    op = next(op for op in graph.ops if op.layer == "head")
    quantization = quantized(graph)
    rounded = graph.rounded(Quantization({"head": quantization.weights["head"]}, dynamic=frozenset({"head"})))
    (_, x), *_ = graph.watch(batch, [op.inputs[0]])
    weight = quantization.weights["head"].dequantize()
    exact = x @ weight.t() + graph.bias("head")
    spans = x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)
    allowed = (spans / 255 * weight.abs().sum(1).max() * 0.6).unsqueeze(1)
    assert bool(((rounded.run(batch)[0] - exact).abs() <= allowed).all())
    assert not torch.equal(rounded.run(batch)[0], exact)


def test_sixteen_bit_weights_are_stored_in_sixteen_bits(graph, batch):
    rounded = graph.rounded(Quantization(casts={"head": "float16"}))
    assert rounded.weight("first").dtype == torch.float32
    stored = dict(rounded.module.named_parameters())["head.weight"]
    assert stored.dtype == torch.float16
    torch.testing.assert_close(rounded.run(batch)[0], graph.run(batch)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_stored_network_has_the_same_codes_and_outputs(graph, batch, tmp_path, bits):
    quantization = quantized(graph, bits)
    rounded = graph.rounded(quantization)
    layers = {layer: f"w{bits}a16" for layer in quantization.weights}
    write_graph(tmp_path, rounded, quantization, {"method": "test", "scheme": "w8a8-static", "layers": layers, "notes": {}})
    assert is_graph(tmp_path)
    found = QuantizedGraph.open(tmp_path)
    torch.testing.assert_close(found.graph().run(batch)[0], rounded.run(batch)[0], rtol=0, atol=0)
    for layer, codes in found.layers().items():
        assert codes.equals(quantization.weights[layer]), layer


def test_a_stored_network_holds_no_float_weights_of_quantized_layers(graph, tmp_path):
    rounded = graph.rounded(quantized(graph))
    names = [*dict(rounded.module.named_parameters()), *dict(rounded.module.named_buffers())]
    assert "first.weight" not in names
    assert "first.weight_codes" in names


def test_what_feeds_a_model_goes_with_it(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "1_Pooling").mkdir(parents=True)
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"):
        (source / name).write_text("{}")
    copy_companions(source, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    }
