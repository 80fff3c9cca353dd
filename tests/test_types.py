"""The values: schemes as strings, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qhub.errors import UsageError
from qhub.types import Estimates, Fact, Goals, LayerShape, ModelProfile, QuantizedModel, Route, Scheme, Step, Target, as_json

CANONICAL = [
    "w4a16-g128-asym",
    "w4a16-g32-sym",
    "w4a16-channel-asym",
    "w2a16-g16-asym",
    "w3a16-g64-asym",
    "w8a8-static",
    "w8a8-dynamic",
    "w8a16",
    "w8a16-g128-asym",
    "fp16",
    "bf16",
    "nf4",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_scheme_round_trips(text):
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert Scheme.parse(str(scheme)) == scheme


def test_every_grid_of_weights_round_trips():
    for bits in range(2, 9):
        for group_size in (None, 16, 32, 64, 128, 256):
            for symmetric in (True, False):
                scheme = Scheme(bits, group_size=group_size, symmetric=symmetric)
                assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("shorthand", "meant"),
    [
        ("w4-g128", "w4a16-g128-asym"),
        ("w4a16-g128", "w4a16-g128-asym"),
        ("W4A16-G128-ASYM", "w4a16-g128-asym"),
        (" w4-g32-sym ", "w4a16-g32-sym"),
        ("w8", "w8a16"),
        ("w4a16-channel", "w4a16"),
    ],
)
def test_shorthand_means_the_usual_scheme(shorthand, meant):
    assert str(Scheme.parse(shorthand)) == meant


@pytest.mark.parametrize("text", ["", "int4", "w1a16", "w9a16", "w4a16-", "w4a16-g128-odd", "w8a8", "w8a8-sometimes", "w4-g", "fp8"])
def test_unknown_scheme_is_named_and_an_example_given(text):
    with pytest.raises(UsageError) as caught:
        Scheme.parse(text)
    assert caught.value.message == f"unknown scheme `{text}`"
    assert caught.value.hint == "write it like `w4a16-g128-asym`, `w8a16`, `w8a8-static`, `fp16` or `nf4`"


@pytest.mark.parametrize("group_size", [0, 1, 8, 48, 100, 512])
def test_odd_group_size_is_refused_with_the_ones_that_exist(group_size):
    with pytest.raises(UsageError) as caught:
        Scheme.parse(f"w4a16-g{group_size}-asym")
    rule = f"has group size `{group_size}`, which is not one of 16, 32, 64, 128, 256"
    assert caught.value.message == f"scheme `w4a16-g{group_size}-asym` {rule}"
    assert caught.value.hint == "try `w4a16-g128-asym`"


@pytest.mark.parametrize(
    ("text", "is_float", "is_weight_only", "bits_per_weight"),
    [
        ("fp16", True, False, 16),
        ("nf4", False, False, 4.25),
        ("w4a16-g128-asym", False, True, 4 + 20 / 128),
        ("w4a16-g128-sym", False, True, 4 + 16 / 128),
        ("w3a16-g32-asym", False, True, 3 + 19 / 32),
        ("w8a8-static", False, False, 8),
        ("w8a16", False, True, 8),
    ],
)
def test_scheme_says_what_it_is_and_what_it_costs(text, is_float, is_weight_only, bits_per_weight):
    scheme = Scheme.parse(text)
    assert (scheme.is_float, scheme.is_weight_only, scheme.bits_per_weight) == (is_float, is_weight_only, bits_per_weight)


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Goals().max_drop_pct = 5.0  # type: ignore[misc]


def test_linears_are_the_matrices_inside_the_blocks():
    kinds = ("embedding", "linear", "norm", "expert", "head")
    layers = tuple(LayerShape(kind, kind, (8, 8), "BF16", 128) for kind in kinds)
    profile = ModelProfile("m", "/m", "llm", "Llama", 10, "BF16", 20, layers)
    assert [layer.name for layer in profile.linears()] == ["linear", "expert"]


@pytest.mark.parametrize(
    ("tied", "counted"), [(False, ["embedding", "norm", "head"]), (True, ["embedding", "norm"])], ids=["own head", "tied"]
)
def test_a_tied_head_counts_once(tied, counted):
    layers = tuple(LayerShape(kind, kind, (8, 8), "BF16", 128) for kind in ("embedding", "norm", "head"))
    profile = ModelProfile("m", "/m", "llm", "Llama", 10, "BF16", 20, layers, tied_embeddings=tied)
    assert [layer.name for layer in profile.weights()] == counted


def test_any_value_becomes_json():
    route = Route("host", "rtn", "weight-only", "w4a16-g128-asym", "rtn", None, None, path=(Step("a", "A?", "yes"),))
    target = Target("t", "T", "linux", "x86_64", isa=("avx2",), bandwidth_bytes_per_s=Fact(1e10, "measured"))
    model = QuantizedModel(Path("a") / "b", "weights", "w8a16", "rtn")
    document = json.loads(json.dumps(as_json({"route": route, "target": target, "model": model, "tags": {"x"}})))
    assert document["route"]["path"] == [{"node": "a", "question": "A?", "answer": "yes"}]
    assert document["route"]["estimates"] == as_json(Estimates())
    assert document["target"]["bandwidth_bytes_per_s"] == {"value": 1e10, "source": "measured", "date": ""}
    assert document["model"]["path"] == str(Path("a") / "b")
    assert document["tags"] == ["x"]
