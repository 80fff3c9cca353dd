"""`ptq` on small networks: every scheme, what its options change, what it refuses, and what it leaves in float."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ptq_networks import IMAGE, ROWS, Normed, convolutions, error, graph_of, images, job_for, outputs, rows
from qhub_ptq.plan import plan_of
from qhub_ptq.plugin import Ptq, qhub_quantizers

from qhub import QhubError, Quantizer, Scheme, Target, UsageError
from qhub.testing.declared import example_profile

#: scheme → the largest relative change of the outputs.
SCHEMES = {
    "w8a8-static": 0.015, "w4a8-static": 0.1, "w4a4-static": 0.2, "w8a8-dynamic": 0.01, "w4a8-dynamic": 0.05, "fp16": 0.001, "bf16": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def graph():
    return graph_of(convolutions(), IMAGE)


def made(graph, batches, scheme, job=None, **options):
    job = job or job_for(graph, batches, scheme)
    result = Ptq(**options).quantize_graph(job)
    return result, result.graph.rounded(result.quantization)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_the_outputs(graph, scheme):
    _, rounded = made(graph, images(), scheme)
    assert error(graph, rounded, images(seed=5)) < SCHEMES[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_like_networks_of_linear_layers_keep_theirs(scheme):
    graph = graph_of(Normed(), ROWS)
    _, rounded = made(graph, rows(), scheme)
    assert error(graph, rounded, rows(seed=5)) < 2 * SCHEMES[scheme]


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a4-static", "w4a8-dynamic"])
def test_it_is_deterministic(graph, scheme):
    one, other = (made(graph, images(), scheme)[0] for _ in range(2))
    assert one.quantization.activations == other.quantization.activations
    assert all(torch.equal(codes.codes, other.quantization.weights[layer].codes) for layer, codes in one.quantization.weights.items())
    assert all(torch.equal(bias, other.quantization.biases[layer]) for layer, bias in one.quantization.biases.items())


def test_static_rounds_every_layer_and_what_it_reads(graph):
    result, _ = made(graph, images(), "w8a8-static")
    layers = {op.layer: op for op in graph.ops if op.has_weight}
    assert set(result.quantization.weights) == set(layers)
    for op in layers.values():
        assert op.name in result.quantization.readers[op.inputs[0]]
    assert set(result.quantization.activations) == set(result.quantization.readers)


def test_dynamic_rounds_linear_layers_and_says_what_it_leaves(graph):
    result, _ = made(graph, images(), "w8a8-dynamic")
    assert result.quantization.dynamic == {"8"}
    assert set(result.notes) == {"0", "3", "5"}
    assert result.notes["0"] == "stays float: dynamic rounding is for linear layers"
    assert result.quantization.casts == {}


@pytest.mark.parametrize(("scheme", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_sixteen_bits_are_casts_and_look_at_no_data(graph, scheme, dtype):
    def no_data():
        raise AssertionError

    result, _ = made(graph, None, scheme, job_for(graph, None, scheme, calibration=no_data))
    assert set(result.quantization.casts.values()) == {dtype}
    assert result.quantization.weights == {}


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic"])
def test_dynamic_works_without_data(scheme):
    graph = graph_of(Normed(), ROWS)
    _, rounded = made(graph, [], scheme)
    assert error(graph, rounded, rows()) < 0.2


def test_static_without_data_is_refused(graph):
    with pytest.raises(QhubError, match="static rounding needs calibration items"):
        made(graph, [], "w8a8-static")


def test_layers_may_stay_float_or_have_another_scheme(graph):
    chosen = {"0": None, "3": Scheme.parse("w4a4-static")}
    default = Scheme.parse("w8a8-static")
    job = job_for(graph, images(), "w8a8-static", scheme_of=lambda layer: chosen.get(layer, default))
    result, rounded = made(graph, images(), "w8a8-static", job)
    assert {layer: codes.bits for layer, codes in result.quantization.weights.items()} == {"3": 4, "5": 8, "8": 8}
    assert "x" not in result.quantization.readers
    plan, _ = plan_of(job)
    of_four = plan.input_of[next(op.name for op in graph.ops if op.layer == "3")]
    assert result.quantization.activations[of_four].bits == 4
    assert torch.equal(rounded.weight("0"), graph.weight("0"))


def test_no_layer_left_is_an_error(graph):
    with pytest.raises(QhubError, match="no layer to quantize"):
        made(graph, images(), "w8a8-static", job_for(graph, images(), "w8a8-static", scheme_of=lambda layer: None))


def test_bias_correction_removes_the_mean_error(graph):
    errors = {}
    for choice in (True, False):
        _, rounded = made(graph, images(), "w8a8-static", correct_bias=choice, range="minmax")
        errors[choice] = float((outputs(rounded, images()) - outputs(graph, images())).mean(0).abs().mean())
    assert errors[True] < errors[False]


def test_compensation_helps_weights_of_few_bits(graph):
    errors = [error(graph, made(graph, images(), "w4a8-static", compensate=choice)[1], images(seed=5)) for choice in (True, False)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("choice", ["mse", "minmax", "percentile", "entropy"])
def test_every_range_works(graph, choice):
    _, rounded = made(graph, images(), "w8a8-static", range=choice)
    assert error(graph, rounded, images(seed=5)) < 0.05


def test_symmetric_activations_have_their_zero_in_the_middle(graph):
    result, rounded = made(graph, images(), "w8a8-static", symmetric=True)
    assert {grid.zero for grid in result.quantization.activations.values()} == {128}
    assert error(graph, rounded, images(seed=5)) < 0.03


DEVICES = {
    "a GPU has no zero points": (Target("t", "", "linux", "x86_64", ("avx2",), ("cuda-8.6",)), True, False),
    "a CPU without VNNI overflows": (Target("t", "", "linux", "x86_64", ("avx2",)), False, True),
    "a CPU with VNNI does not": (Target("t", "", "linux", "x86_64", ("avx2", "avx512_vnni")), False, False),
    "nor does Arm": (Target("t", "", "linux", "aarch64", ("neon",)), False, False),
}


@pytest.mark.parametrize(("target", "symmetric", "reduced"), DEVICES.values(), ids=DEVICES)
def test_the_device_decides_what_is_left_open(graph, target, symmetric, reduced):
    result, _ = made(graph, images(), "w8a8-static", job_for(graph, images(), "w8a8-static", target=target))
    assert ({grid.zero for grid in result.quantization.activations.values()} == {128}) == symmetric
    most = max(int((codes.codes.int() - 128).abs().max()) for codes in result.quantization.weights.values())
    assert (most <= 64) == reduced


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic"])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_layer(scheme):
    model = convolutions()
    with torch.no_grad():
        model[5].bias[0] = float("nan")
    with pytest.raises(QhubError, match=r"which `.*` reads, holds numbers that are not finite"):
        made(graph_of(model, IMAGE), images(), scheme)


def test_an_input_that_is_not_finite_is_named():
    batches = images()
    batches[1]["x"][0, 0, 0, 0] = np.inf
    with pytest.raises(QhubError, match="tensor `x`, which `0` reads"):
        made(graph_of(convolutions(), IMAGE), batches, "w8a8-static")


def harmful(seed=0):
    """Convolutions of which the one in the middle cannot be rounded: its outputs are small differences of large weights."""
    model = convolutions(seed)
    with torch.no_grad():
        model[5].weight[:, 0] *= 3000
        model[3].weight[0] *= 0.001
        model[3].bias[0] *= 0.001
    return model


def test_what_costs_too_much_stays_float_and_is_named():
    graph, batches, told = graph_of(harmful(), IMAGE), images(), []
    options = {"equalize": "off", "correct_bias": False}
    loss = 100 * error(graph, made(graph, batches, "w8a8-static", **options)[1], batches)
    job = job_for(graph, batches, "w8a8-static", max_drop_pct=loss / 4, note=told.append)
    result, rounded = made(graph, batches, "w8a8-static", job, **options)
    assert list(result.notes) == ["5"]
    assert result.notes["5"].startswith("stays float: ")
    assert result.quantization.casts == {"5": "float16"}
    assert set(result.quantization.weights) == {"0", "3", "8"}
    assert 100 * error(graph, rounded, batches) < loss / 4 + 0.1
    assert "looking for what to keep in float" in told[0]


@pytest.mark.parametrize("scheme", ["w4a4-static", "w4a8-dynamic"])
def test_a_goal_that_nothing_reaches_leaves_the_network_float(graph, scheme):
    job = job_for(graph, images(), scheme, max_drop_pct=0.0)
    result, _ = made(graph, images(), scheme, job)
    assert result.quantization.weights == {}
    assert not any(result.quantization.readers.values())
    assert error(graph, result.graph.rounded(replace(result.quantization, casts={})), images()) < 1e-5


def test_no_more_than_needed_stays_float(graph):
    batches = images()
    whole = 100 * error(graph, made(graph, batches, "w4a4-static")[1], batches)
    result, _ = made(graph, batches, "w4a4-static", job_for(graph, batches, "w4a4-static", max_drop_pct=0.7 * whole))
    kept = [layer for layer in result.notes if layer in {"0", "3", "5", "8"}]
    assert 0 < len(kept) < 4
    assert result.quantization.biases.keys() <= result.quantization.weights.keys()


@pytest.mark.parametrize("scheme", ["w4a16-g128-asym", "w8a16", "w8a4-static", "w4a4-dynamic", "nf4"])
def test_schemes_that_it_does_not_write_are_refused(scheme):
    profile = replace(example_profile(), task="vision")
    assert Ptq().reject(profile, Scheme.parse(scheme)).startswith(f"`ptq` does not write scheme `{scheme}`; it writes w8a8-static")
    assert Ptq().reject(profile, Scheme.parse("w8a8-static")) is None


def test_language_models_are_for_others():
    profile = replace(example_profile(), task="llm")
    assert "`awq`, `gptq` and `rtn`" in Ptq().reject(profile, Scheme.parse("w8a8-dynamic"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": "widest"}, "option `range` of `ptq` is `widest`"),
        ({"smooth": 1.5}, "option `smooth` of `ptq` is `1.5`"),
        ({"correct_bias": 1}, "option `correct_bias` of `ptq` is `1`"),
        ({"equalize": True}, "option `equalize` of `ptq` is `True`"),
        ({"speed": 9}, "quantizer `ptq` has no option `speed`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_a_usage_error(options, message):
    with pytest.raises(UsageError) as error:
        Ptq(**options)
    assert error.value.message == message


def test_it_serves_three_families():
    (quantizer,) = qhub_quantizers()
    assert [family for family in ("qat", "weight-only", "static", "dynamic", "float16") if quantizer.serves(family)] == [
        "static", "dynamic", "float16",
    ]  # fmt: skip
    assert Quantizer().serves("weight-only")


def test_the_plugin_is_described_without_torch():
    code = "import sys; from qhub_ptq.plugin import qhub_quantizers; qhub_quantizers(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
