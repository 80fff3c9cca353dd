"""What is known of a layer's input, against brute force."""

import pytest
import torch
from ptq_networks import graph_of
from qhub_ptq.moments import Mean, Moments, round_on, taps_of
from torch import nn

from qhub import ActivationGrid, GraphInput

CONVOLUTIONS = {
    "one group": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 3, 3, dilation=2),
    "in groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, stride=2, groups=4),
    "of one place": nn.Conv2d(4, 8, 1),
}


def of_conv(conv):
    graph = graph_of(conv, (GraphInput("x", (-1, 4, 7, 7), "float32"),))
    return graph, next(op for op in graph.ops if op.kind == "conv")


def unfolded(conv, x):
    """(G, rows, K) the usual way."""
    patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return patches.transpose(1, 2).reshape(-1, conv.groups, conv.weight[0].numel()).transpose(0, 1)


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_taps_are_those_of_im2col(conv):
    graph, op = of_conv(conv)
    x = torch.randn(5, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(taps_of(graph, op, x), unfolded(conv, x))


def test_taps_of_a_linear_layer_are_its_rows():
    graph = graph_of(nn.Linear(6, 3), (GraphInput("x", (-1, 6), "float32"),))
    x = torch.randn(4, 6)
    assert torch.equal(taps_of(graph, graph.ops[0], x)[0], x)


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_mean_output_is_that_of_all_items(conv):
    graph, op = of_conv(conv)
    generator = torch.Generator().manual_seed(0)
    mean, every = Mean(), []
    for items, size in ((5, 7), (3, 7), (2, 9)):
        x = torch.randn(items, 4, size, size, generator=generator)
        mean.add(op, x)
        every.append(graph.apply(op, graph.weight(op.layer), x).movedim(1, 0).flatten(1))
    torch.testing.assert_close(mean.output(graph, op, graph.weight(op.layer)), torch.cat(every, 1).mean(1), rtol=1e-4, atol=1e-5)


def test_products_add_up_over_batches():
    moments, generator = Moments(), torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 10, 3, generator=generator) for _ in range(3)]
    for part in parts:
        moments.add_products(part, part.round())
    whole = torch.cat(parts, 1)
    torch.testing.assert_close(moments.gram, whole.round().mT @ whole.round())
    torch.testing.assert_close(moments.cross, whole.mT @ whole.round())
    assert moments.rows == 30


def test_rounding_clips_at_both_ends_and_changes_nothing_without_a_grid():
    grid = ActivationGrid(0.5, 2, 4)
    x = torch.tensor([-9.0, -0.6, 0.0, 0.2, 0.3, 99.0])
    assert round_on(grid, x).tolist() == [-1.0, -0.5, 0.0, 0.0, 0.5, 6.5]
    assert round_on(None, x) is x
    assert (grid.low, grid.high) == (-1.0, 6.5)
