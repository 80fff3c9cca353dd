"""Channels scaled between what makes a tensor and who reads it: nothing changes but how well it rounds."""

import pytest
import torch
from ptq_networks import IMAGE, ROWS, Normed, convolutions, error, graph_of, images, job_for, outputs, rows
from qhub_ptq.chains import chains, folded, input_sizes, multiplied
from qhub_ptq.plugin import Ptq
from torch import nn


def scales_of(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {chain: torch.rand(chain.channels, generator=generator) * 3 + 0.1 for chain in chains(graph)}


def test_convolutions_that_follow_each_other_are_chains():
    graph = graph_of(convolutions(), IMAGE)
    found = list(chains(graph))
    assert [(chain.maker.layer, [op.layer for op in chain.readers], chain.channels) for chain in found] == [
        ("0", ["3"], 8),
        ("3", ["5"], 8),
    ]


def test_a_norm_and_the_layers_that_read_it_are_a_chain():
    found = list(chains(graph_of(Normed(), ROWS)))
    assert [(chain.maker.layer, [op.layer for op in chain.readers]) for chain in found] == [("norm", ["one", "two"])]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.one(x))
        return h + self.two(h)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.one(torch.relu(self.one(x)))


@pytest.mark.parametrize(
    "model",
    [convolutions(activation=nn.ReLU6), convolutions(activation=nn.GELU), Residual(), Twice()],
    ids=["a ReLU that stops at six", "a GELU", "a sum that reads the tensor too", "a layer used twice"],
)
def test_no_chain_where_scaling_would_change_something(model):
    assert list(chains(graph_of(model, IMAGE))) == []


@pytest.mark.parametrize(
    ("model", "inputs", "batches"), [(convolutions(), IMAGE, images()), (Normed(), ROWS, rows())], ids=["conv", "norm"]
)
def test_folding_leaves_the_float_outputs_as_they_were(model, inputs, batches):
    graph = graph_of(model, inputs)
    other = folded(graph, scales_of(graph))
    torch.testing.assert_close(outputs(other, batches), outputs(graph, batches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scaling_a_weight_is_scaling_its_input(groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    x, scale = torch.randn(2, 4, 5, 5), torch.rand(4) + 0.5
    with torch.no_grad():
        made = nn.functional.conv2d(x / scale.reshape(-1, 1, 1), multiplied(conv.weight, scale), groups=groups)
        torch.testing.assert_close(made, conv(x))
        sizes = input_sizes(conv.weight, 4)
    assert sizes.shape == (4,)
    for channel in range(4):
        alone = multiplied(conv.weight.detach(), torch.eye(4)[channel])
        assert float(alone.abs().max()) == float(sizes[channel])


def uneven(seed=0):
    """Convolutions between which some channels are a hundred times larger than others."""
    model = convolutions(seed)
    with torch.no_grad():
        for maker, reader in ((model[3], model[5]),):
            size = torch.logspace(-1, 1, 8)
            maker.weight.mul_(size.reshape(-1, 1, 1, 1))
            maker.bias.mul_(size)
            reader.weight.div_(size.reshape(1, -1, 1, 1))
    return model


def test_equalised_convolutions_round_better():
    graph, batches = graph_of(uneven(), IMAGE), images()
    made = {choice: Ptq(equalize=choice).quantize_graph(job_for(graph, batches, "w8a8-static")) for choice in ("auto", "off")}
    errors = {choice: error(graph, result.graph.rounded(result.quantization), images(seed=9)) for choice, result in made.items()}
    assert errors["auto"] < 0.7 * errors["off"]
    assert error(graph, made["auto"].graph, batches) < 1e-4


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-dynamic"])
def test_a_smoothed_norm_rounds_better(scheme):
    graph, batches = graph_of(Normed(), ROWS), rows()
    made = {choice: Ptq(smooth=choice).quantize_graph(job_for(graph, batches, scheme)) for choice in ("auto", "off")}
    errors = {choice: error(graph, result.graph.rounded(result.quantization), rows(seed=9)) for choice, result in made.items()}
    assert errors["auto"] < 0.95 * errors["off"]
    assert error(graph, made["auto"].graph, batches) < 1e-4


def test_smoothing_takes_a_number_for_the_exponent():
    graph, batches = graph_of(Normed(), ROWS), rows()
    result = Ptq(smooth=0.5).quantize_graph(job_for(graph, batches, "w8a8-static"))
    assert not torch.equal(result.graph.weight("norm"), graph.weight("norm"))
