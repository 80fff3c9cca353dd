"""Torch programs written as ONNX: the same codes, what the engine fuses, and what is refused."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_graphs import dynamic, encoder, residual, static

from qhub.errors import Unsupported
from qhub.graph.onnx_lower import OnnxOptions, open_program, write_onnx
from qhub.graph.onnx_passes import OPENVINO, TENSORRT, OnnxStyle
from qhub.graph.onnx_stored import DIGEST, read_onnx_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch calls it itself, when a program is copied
NETWORKS = {"image": functools.cache(residual), "text": functools.cache(encoder)}


def session(path: Path, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def fused(path: Path) -> Counter[str]:
    """The operations that onnxruntime runs for the file."""
    session(path, path.with_suffix(".optimised"))
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimised")).graph.node)


def run(path: Path, batch) -> np.ndarray:
    opened = session(path)
    return opened.run(None, {item.name: batch[item.name] for item in opened.get_inputs()})[0]


def sqnr(reference: torch.Tensor, found: np.ndarray) -> float:
    return float(10 * np.log10((reference.numpy() ** 2).sum() / ((reference.numpy() - found) ** 2).sum().clip(1e-30)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a network rounded: the rounded graph, its file, its quantization and batch. The same one is written once."""

    @functools.cache
    def write(which, bits=(8, 8), **options):
        graph, batch = NETWORKS[which]()
        quantization = static(graph, batch, bits, symmetric=options.get("style") is TENSORRT)
        rounded, path = graph.rounded(quantization), tmp_path_factory.mktemp("written") / "model.onnx"
        write_onnx(rounded, path, OnnxOptions(recipe_digest="abc123", **options))
        return rounded, path, quantization, batch

    return write


def assert_same_codes(path, quantization):
    found = read_onnx_layers(path)
    assert set(found) == set(quantization.weights)
    for layer, tensor in quantization.weights.items():
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found[layer], part), getattr(tensor, part)), f"{layer}: {part}"
        assert (found[layer].bits, found[layer].symmetric) == (tensor.bits, tensor.symmetric)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (3, 8)], ids=["w8a8", "w4a8", "w4a4", "w3a8"])
def test_an_image_network_computes_in_integers_with_exactly_its_codes(written, bits):
    rounded, path, quantization, batch = written("image", bits)
    assert_same_codes(path, quantization)
    assert sqnr(rounded.run(batch)[0], run(path, batch)) > 30
    ops = fused(path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"], ops["QLinearGlobalAveragePool"]) == (3, 1, 1, 1)
    assert not {"Conv", "Gemm", "Add", "ReduceMean", "DequantizeLinear"} & set(ops)
    assert ops["QuantizeLinear"] == 1  # the input's


@pytest.mark.parametrize("style", [OPENVINO, TENSORRT], ids=["openvino", "tensorrt"])
def test_other_engines_get_the_same_codes_and_a_float_bias(written, style):
    rounded, path, quantization, batch = written("image", style=style)
    assert_same_codes(path, quantization)
    assert sqnr(rounded.run(batch)[0], run(path, batch)) > 80
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert stored["second.bias"] == onnx.TensorProto.FLOAT
    assert not any(name.endswith("bias_codes") for name in stored)


def test_for_tensorrt_every_zero_is_0(written):
    _, path, _, _ = written("image", style=TENSORRT)
    model = onnx.load(path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [stored[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_asymmetric_activations_are_refused_for_tensorrt(tmp_path):
    graph, batch = residual()
    with pytest.raises(Unsupported, match=r"`image` is rounded with the zero `\d+`"):
        write_onnx(graph.rounded(static(graph, batch)), tmp_path / "model.onnx", OnnxOptions(TENSORRT))


def test_four_bit_codes_take_half_a_byte_and_the_opset_that_has_them(written):
    _, path, _, _ = written("image", (4, 8))
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored["third.weight_codes"].data_type == onnx.TensorProto.INT4
    assert len(stored["third.weight_codes"].raw_data) == 16 * 16 * 9 // 2
    assert [item.version for item in model.opset_import if item.domain == ""] == [21]


def test_a_static_text_network_multiplies_integers(written):
    rounded, path, quantization, batch = written("text")
    assert_same_codes(path, quantization)
    assert sqnr(rounded.run(batch)[0], run(path, batch)) > 30
    ops = fused(path)
    assert ops["MatMulIntegerToFloat"] + ops["QGemm"] == len(quantization.weights)


@pytest.mark.parametrize(
    ("style", "wanted"),
    [
        (OnnxStyle(), {"DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 2}),  # query and key round what they read once
        (OnnxStyle(dynamic="blocks"), {"MatMulNBits": 5}),
        (OPENVINO, {}),
    ],
    ids=["tensor", "blocks", "engine"],
)
def test_rows_rounded_while_running(tmp_path, style, wanted):
    graph, batch = encoder()
    quantization = dynamic(graph)
    path = tmp_path / "model.onnx"
    write_onnx(graph.rounded(quantization), path, OnnxOptions(style))
    assert_same_codes(path, quantization)
    assert sqnr(graph.rounded(quantization).run(batch)[0], run(path, batch)) > 30
    ops = fused(path)
    assert {op: ops[op] for op in wanted} == wanted


def test_four_bits_in_blocks(tmp_path):
    graph, batch = encoder()
    quantization, path = dynamic(graph, 4), tmp_path / "model.onnx"
    write_onnx(graph.rounded(quantization), path, OnnxOptions(OnnxStyle(dynamic="blocks")))
    assert_same_codes(path, quantization)
    assert sqnr(graph.rounded(quantization).run(batch)[0], run(path, batch)) > 30


def test_blocks_refuse_what_they_do_not_hold(tmp_path):
    graph, _ = encoder()
    with pytest.raises(Unsupported, match="layer `query` has 3 bits"):
        write_onnx(graph.rounded(dynamic(graph, 3)), tmp_path / "model.onnx", OnnxOptions(OnnxStyle(dynamic="blocks")))


def test_names_and_varying_axes_survive(tmp_path):
    graph, batch = encoder()
    path = tmp_path / "model.onnx"
    write_onnx(graph, path)
    opened = session(path)
    assert [(item.name, item.shape) for item in opened.get_inputs()] == [("ids", ["batch", "sequence"]), ("mask", ["batch", "sequence"])]
    assert [(item.name, item.shape) for item in opened.get_outputs()] == [("logits", ["batch", 4])]
    for rows, length in ((1, 3), (5, 9)):
        other = {name: np.resize(array, (rows, length)) for name, array in batch.items()}
        assert np.allclose(run(path, other), graph.run(other)[0], atol=1e-5)


def test_the_file_says_by_which_recipe_and_nothing_of_this_machine(written):
    _, path, _, _ = written("image")
    model = onnx.load(path)
    assert {item.key: item.value for item in model.metadata_props}[DIGEST] == "abc123"
    assert b"/" + b"qhub/" not in path.read_bytes()
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_weights_go_into_a_file_beside_it_on_request(written):
    rounded, path, quantization, batch = written("image", external_data=True)
    assert path.with_name("model.onnx.data").stat().st_size >= 16 * 16 * 9
    assert_same_codes(path, quantization)
    assert sqnr(rounded.run(batch)[0], run(path, batch)) > 30


def test_integer_operations_on_request(written):
    rounded, path, quantization, batch = written("image", qoperator=True)
    assert Counter(node.op_type for node in onnx.load(path).graph.node)["QLinearConv"] == 3
    assert_same_codes(path, quantization)
    assert sqnr(rounded.run(batch)[0], run(path, batch)) > 30


def test_layers_with_equal_codes_stay_two(tmp_path):
    graph, batch = residual()
    weight = graph.weight("third")
    graph = graph.with_layers({"third": (torch.ones_like(weight), None), "linear": (torch.ones(5, 16), None)})
    quantization = static(graph, batch)
    write_onnx(graph.rounded(quantization), tmp_path / "model.onnx")
    assert_same_codes(tmp_path / "model.onnx", quantization)


def test_a_saved_program_is_written_as_the_graph_it_came_from(tmp_path, written):
    rounded, path, _, batch = written("image")
    rounded.save(tmp_path / "model.pt2")
    assert open_program(tmp_path / "model.pt2").inputs[0].shape == (-1, 3, 8, 8)
    (tmp_path / "qhub.json").write_text(
        '{"kind": "graph", "inputs": [{"name": "image", "shape": [-1, 3, 8, 8], "dtype": "float32"}], "outputs": ["logits"]}'
    )
    write_onnx(tmp_path / "model.pt2", tmp_path / "a.onnx")
    assert np.array_equal(run(tmp_path / "a.onnx", batch), run(path, batch))
