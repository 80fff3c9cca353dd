"""Where networks are rounded, from the kinds of their operations."""

from __future__ import annotations

import pytest

from qhub.graph.placement import place
from qhub.graph.values import ActivationGrid, Op, Quantization


def placed(*ops: Op) -> dict[str, tuple[str, ...]]:
    return {point.tensor: point.readers for point in place(ops)}


def conv(name: str, source: str) -> Op:
    return Op(name, "conv", (source,), name)


def linear(name: str, source: str) -> Op:
    return Op(name, "linear", (source,), name, -1)


def test_a_convolution_reads_and_writes_rounded_numbers():
    assert placed(conv("a", "x"), Op("tail", "other", ("a",))) == {"x": ("a",), "a": ("tail",)}


def test_a_relu_is_part_of_the_convolution_before_it():
    found = placed(conv("a", "x"), Op("relu", "clip", ("a",)), conv("b", "relu"), Op("tail", "other", ("b",)))
    assert found == {"x": ("a",), "relu": ("b",), "b": ("tail",)}


def test_what_is_clipped_and_read_elsewhere_is_rounded_before_the_clip_too():
    found = placed(conv("a", "x"), Op("relu", "clip", ("a",)), conv("b", "relu"), conv("c", "a"), Op("tail", "other", ("b", "c")))
    assert found["a"] == ("relu", "c")
    assert found["relu"] == ("b",)


def test_a_sum_of_convolutions_computes_in_integers():
    found = placed(conv("a", "x"), conv("b", "a"), Op("sum", "join", ("a", "b")), Op("relu", "clip", ("sum",)), conv("c", "relu"))
    assert found["a"] == ("b", "sum")
    assert found["b"] == ("sum",)
    assert found["relu"] == ("c",)
    assert "sum" not in found


def test_the_residual_stream_of_a_transformer_stays_float():
    found = placed(
        Op("norm", "norm", ("x",)),
        linear("q", "norm"),
        linear("k", "norm"),
        Op("attention", "other", ("q", "k")),
        linear("out", "attention"),
        Op("sum", "join", ("out", "x")),
        Op("norm2", "norm", ("sum",)),
        linear("up", "norm2"),
    )
    assert found == {"norm": ("q", "k"), "attention": ("out",), "norm2": ("up",)}


def test_a_sum_of_convolutions_that_a_norm_reads_stays_float():
    found = placed(conv("a", "x"), conv("b", "x"), Op("sum", "join", ("a", "b")), Op("norm", "norm", ("sum",)))
    assert found["a"] == ("sum",)  # what a convolution makes is rounded all the same
    assert "sum" not in found


def test_what_only_moves_numbers_shares_the_grid_of_what_it_moves():
    points = place([conv("a", "x"), Op("slice", "carry", ("a",)), Op("pad", "carry", ("slice",)), conv("b", "pad")])
    assert {point.tensor: point.like for point in points} == {"x": None, "a": None, "slice": "a", "pad": "a"}


def test_an_average_of_convolutions_has_a_grid_of_its_own():
    points = place([conv("a", "x"), Op("pool", "pool", ("a",)), Op("flat", "carry", ("pool",)), linear("head", "flat")])
    found = {point.tensor: point.like for point in points}
    assert found == {"x": None, "a": None, "pool": None, "flat": "pool"}


def test_a_network_without_weights_is_not_rounded():
    assert place([Op("a", "other", ("x",)), Op("b", "norm", ("a",))]) == ()


@pytest.mark.parametrize(("zero", "low", "high"), [(0, 0.0, 25.5), (128, -12.8, 12.7), (255, -25.5, 0.0)], ids=str)
def test_a_grid_spans_from_its_lowest_to_its_highest_code(zero, low, high):
    grid = ActivationGrid(0.1, zero)
    assert (grid.low, grid.high) == pytest.approx((low, high))


def test_an_operation_taken_back_to_float_no_longer_reads_rounded_numbers():
    quantization = Quantization(readers={"x": ("a",), "y": ("a", "b")}, dynamic=frozenset({"a", "b"}))
    left = quantization.without([linear("a", "x")])
    assert left.readers == {"y": ("b",)}
    assert left.dynamic == {"b"}
