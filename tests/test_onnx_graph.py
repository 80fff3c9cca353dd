"""Float ONNX files as graphs: what they are made of, run, watched and rounded; and what is said of files that are not right."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import dynamic, encoder, residual, round_to_nearest, static

from qhub.errors import DamagedModelError, QhubError, Unsupported
from qhub.graph.onnx_graph import OnnxGraph
from qhub.graph.onnx_lower import write_onnx
from qhub.graph.onnx_stored import read_onnx_layers
from qhub.graph.values import GraphInput, Quantization

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch calls it itself, when a program is copied


@functools.cache
def torch_network(which):
    return {"image": residual, "text": encoder}[which]()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The float networks as torch exports them."""
    folder = tmp_path_factory.mktemp("float")
    for which in ("image", "text"):
        write_onnx(torch_network(which)[0], folder / f"{which}.onnx")
    return folder


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10((reference**2).sum() / ((reference - found) ** 2).sum().clamp_min(1e-30)))


def hand_made(tmp_path: Path, nodes, stored=None, *, shape=("batch", 4, 8, 8), opset=20, name="model.onnx") -> Path:
    """A file of these nodes from `x` to `y`, written as they are."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(np.asarray(array, np.float32), key) for key, array in (stored or {}).items()]
    graph = helper.make_graph(nodes, "hand made", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), tmp_path / name)
    return tmp_path / name


def conv(weight="w", out="y", **about):
    return helper.make_node("Conv", ["x", weight], [out], name="the_conv", **about)


WEIGHT = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32)
X = {"x": np.random.default_rng(2).standard_normal((3, 4, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("which", ["image", "text"])
def test_a_file_computes_what_the_torch_graph_does(files, which):
    graph, batch = torch_network(which)
    found = OnnxGraph.of(files / f"{which}.onnx")
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    assert torch.allclose(found.run(batch)[0], graph.run(batch)[0], atol=1e-5)


@pytest.mark.parametrize("which", ["image", "text"])
def test_layers_have_the_names_weights_and_biases_of_the_torch_graph(files, which):
    graph = torch_network(which)[0]
    found = OnnxGraph.of(files / f"{which}.onnx")
    theirs = {op.layer: op.kind for op in graph.ops if op.has_weight}
    ours = {op.layer: op.kind for op in found.ops if op.has_weight}
    assert set(ours.values()) == set(theirs.values())
    if which == "image":
        assert ours == theirs
        for layer in theirs:
            assert torch.equal(found.weight(layer), graph.weight(layer))
            bias = found.bias(layer)  # the exporter leaves one out that is all zeros
            assert torch.equal(torch.zeros(len(graph.bias(layer))) if bias is None else bias, graph.bias(layer))


def test_kinds_of_an_image_network(files):
    kinds = Counter(op.kind for op in OnnxGraph.of(files / "image.onnx").ops)
    assert (kinds["conv"], kinds["linear"], kinds["join"], kinds["clip"], kinds["pool"]) == (3, 1, 1, 3, 1)
    assert kinds["carry"] >= 2  # the slice and the padding
    assert kinds["other"] == 0


def test_watching_yields_tensors_and_inputs(files):
    _, batch = torch_network("image")
    found = OnnxGraph.of(files / "image.onnx")
    op = next(op for op in found.ops if op.layer == "second")
    seen = dict(found.watch(batch, ["image", op.name]))
    assert seen[op.name].shape == (6, 16, 4, 4)
    assert torch.equal(seen["image"], torch.from_numpy(batch["image"]))


@pytest.mark.parametrize("which", ["image", "text"])
def test_applying_a_layer_gives_its_product_without_the_bias(files, which):
    _, batch = torch_network(which)
    found = OnnxGraph.of(files / f"{which}.onnx")
    for op in (op for op in found.ops if op.has_weight):
        seen = dict(found.watch(batch, [op.inputs[0], op.name]))
        bias = found.bias(op.layer)
        made = found.apply(op, found.weight(op.layer), seen[op.inputs[0]])
        if bias is not None:
            made = made + (bias.reshape(-1, 1, 1) if op.kind == "conv" else bias)
        assert torch.allclose(made, seen[op.name], atol=1e-5), op
    changed = found.with_layers({op.layer: (found.weight(op.layer) * 2, None)})
    assert torch.equal(changed.weight(op.layer), found.weight(op.layer) * 2)
    assert torch.equal(OnnxGraph.of(files / f"{which}.onnx").weight(op.layer), found.weight(op.layer))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=["w8a8", "w4a8", "w4a4"])
def test_rounded_it_holds_exactly_the_codes_and_computes_in_integers(files, tmp_path, bits):
    graph, batch = torch_network("image")
    found = OnnxGraph.of(files / "image.onnx")
    quantization = static(found, batch, bits)
    rounded = found.rounded(quantization)
    rounded.save(tmp_path / "model.onnx")
    stored = read_onnx_layers(tmp_path / "model.onnx")
    loaded = OnnxGraph.load(tmp_path / "model.onnx", found.inputs, found.outputs)
    for layers in (stored, rounded.layers(dict.fromkeys(quantization.weights, 8)), loaded.layers(dict.fromkeys(quantization.weights, 8))):
        for layer, tensor in quantization.weights.items():
            assert torch.equal(layers[layer].codes, tensor.codes)
            assert torch.equal(layers[layer].scale, tensor.scale)
            assert (layers[layer].bits, layers[layer].symmetric) == (bits[0], True)
    assert torch.equal(loaded.run(batch)[0], rounded.run(batch)[0])
    if bits == (8, 8):
        assert sqnr(graph.rounded(static(graph, batch)).run(batch)[0], rounded.run(batch)[0]) > 30
    ops = fused(tmp_path / "model.onnx")
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"], ops["QLinearGlobalAveragePool"]) == (3, 1, 1, 1)
    assert not {"Conv", "Gemm", "Add", "ReduceMean"} & set(ops)


def fused(path: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path.with_suffix(".optimised"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimised")).graph.node)


def test_rows_rounded_while_running(files, tmp_path):
    _, batch = torch_network("text")
    found = OnnxGraph.of(files / "text.onnx")
    quantization = dynamic(found)
    rounded = found.rounded(quantization)
    rounded.save(tmp_path / "model.onnx")
    assert sqnr(found.run(batch)[0], rounded.run(batch)[0]) > 25
    stored = read_onnx_layers(tmp_path / "model.onnx")
    assert all(torch.equal(stored[layer].codes, tensor.codes) for layer, tensor in quantization.weights.items())
    ops = fused(tmp_path / "model.onnx")
    assert ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_16_bits(files, dtype):
    _, batch = torch_network("image")
    found = OnnxGraph.of(files / "image.onnx")
    cast = found.rounded(Quantization(casts={op.layer: dtype for op in found.ops if op.has_weight}))
    assert cast.model.ByteSize() < 0.65 * found.model.ByteSize()
    assert sqnr(found.run(batch)[0], cast.run(batch)[0]) > 40


def test_a_bias_goes_where_none_was(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "proj.weight"], ["y"])]
    found = OnnxGraph.of(hand_made(tmp_path, nodes, {"proj.weight": WEIGHT[:, :, 0, 0]}, shape=("batch", 4)))
    batch = {"x": np.ones((2, 4), np.float32)}
    changed = found.with_layers({"proj": (found.weight("proj"), torch.arange(4.0))})
    assert torch.allclose(changed.run(batch)[0], found.run(batch)[0] + torch.arange(4.0))
    assert torch.equal(changed.bias("proj"), torch.arange(4.0))
    assert torch.equal(found.weight("proj"), torch.from_numpy(WEIGHT[:, :, 0, 0].T.copy()))


def test_batch_norms_are_folded(tmp_path):
    rng = np.random.default_rng(0)
    stored = {"conv.weight": WEIGHT, **{name: rng.random(4) + 0.5 for name in ("gamma", "beta", "mean", "var")}}
    nodes = [conv("conv.weight", "c", pads=[1] * 4), helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"])]
    path = hand_made(tmp_path, nodes, stored)
    found = OnnxGraph.of(path)
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, X)[0]
    assert [op.kind for op in found.ops] == ["conv"]
    assert np.allclose(found.run(X)[0], expected, atol=1e-5)


def test_a_transposed_convolution_is_rounded_per_output(tmp_path):
    path = hand_made(tmp_path, [helper.make_node("ConvTranspose", ["x", "up.weight"], ["y"], strides=[2, 2])], {"up.weight": WEIGHT[:, :3]})
    found = OnnxGraph.of(path)
    assert found.weight("up").shape == (3, 4, 3, 3)
    quantization = static(found, X)
    assert quantization.weights["up"].codes.shape == (3, 36)
    rounded = found.rounded(quantization)
    assert torch.equal(rounded.layers({"up": 8})["up"].codes, quantization.weights["up"].codes)
    assert sqnr(found.run(X)[0], rounded.run(X)[0]) > 30


def test_a_weight_behind_a_transpose_is_found(tmp_path):
    nodes = [helper.make_node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    found = OnnxGraph.of(hand_made(tmp_path, nodes, {"fc.weight": WEIGHT[:, :, 1, 1]}, shape=("batch", 4)))
    assert [(op.kind, op.layer) for op in found.ops] == [("linear", "fc")]
    assert torch.equal(found.weight("fc"), torch.from_numpy(WEIGHT[:, :, 1, 1].copy()))


def test_a_fixed_batch_of_one_is_run_item_by_item(tmp_path):
    free = OnnxGraph.of(hand_made(tmp_path, [conv(out="y")], {"w": WEIGHT}))
    fixed = OnnxGraph.of(hand_made(tmp_path, [conv(out="y")], {"w": WEIGHT}, shape=(1, 4, 8, 8), name="fixed.onnx"))
    assert fixed.inputs == (GraphInput("x", (1, 4, 8, 8), "float32"),)
    assert torch.allclose(fixed.run(X)[0], free.run(X)[0], atol=1e-6)
    assert dict(fixed.watch(X, ["y"]))["y"].shape == (3, 4, 6, 6)


def test_an_old_opset_is_brought_up(tmp_path):
    found = OnnxGraph.of(hand_made(tmp_path, [conv()], {"w": WEIGHT}, opset=11))
    assert max(item.version for item in found.model.opset_import) >= 13
    assert sqnr(found.run(X)[0], found.rounded(static(found, X)).run(X)[0]) > 30


def test_a_norm_is_a_layer_too(tmp_path):
    nodes = [helper.make_node("LayerNormalization", ["x", "norm.weight", "norm.bias"], ["y"])]
    path = hand_made(tmp_path, nodes, {"norm.weight": np.ones(4), "norm.bias": np.zeros(4)}, shape=("batch", 4))
    found = OnnxGraph.of(path)
    assert [(op.kind, op.layer) for op in found.ops] == [("norm", "norm")]
    changed = found.with_layers({"norm": (torch.full((4,), 2.0), torch.ones(4))})
    batch = {"x": np.random.default_rng(0).random((2, 4)).astype(np.float32)}
    assert torch.allclose(changed.run(batch)[0], found.run(batch)[0] * 2 + 1, atol=1e-5)


# What is wrong with a file: each is one error that names the node, and says a way out.


def refused(path: Path, kind: type[QhubError] = QhubError) -> QhubError:
    with pytest.raises(kind) as caught:
        OnnxGraph.of(path)
    assert caught.value.hint
    return caught.value


def test_a_missing_initializer(tmp_path):
    said = refused(hand_made(tmp_path, [conv()]), DamagedModelError).message
    assert "node `the_conv` (Conv) reads `w`, which is neither stored nor made" in said


def test_an_opset_that_is_too_new(tmp_path):
    assert (
        "uses opset `99`; the newest known here is" in refused(hand_made(tmp_path, [conv()], {"w": WEIGHT}, opset=99), Unsupported).message
    )


def test_an_operator_of_a_foreign_domain(tmp_path):
    path = hand_made(tmp_path, [helper.make_node("Magic", ["x"], ["y"], name="trick", domain="org.acme")])
    assert "node `trick` (Magic) is of the domain `org.acme`" in refused(path, Unsupported).message


def test_an_operator_that_onnx_does_not_have(tmp_path):
    path = hand_made(tmp_path, [helper.make_node("Magic", ["x"], ["y"], name="trick")])
    assert "node `trick` (Magic) is no ONNX operator" in refused(path, Unsupported).message


@pytest.mark.parametrize("damage", ["missing", "short", "outside"])
def test_external_data_that_is_not_right(tmp_path, damage):
    path = hand_made(tmp_path, [conv()], {"w": WEIGHT})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if damage == "missing":
        (tmp_path / "weights.bin").unlink()
    elif damage == "short":
        (tmp_path / "weights.bin").write_bytes(b"1234")
    else:
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].external_data[0].value = "../weights.bin"
        path.write_bytes(model.SerializeToString())
    said = {
        "missing": "weights.bin` does not exist, which holds `w`",
        "short": "is too short for `w`",
        "outside": "a file outside its folder",
    }
    assert said[damage] in refused(path).message


@pytest.mark.parametrize("content", [b"\x00\x01no protobuf at all", b""], ids=["other bytes", "empty"])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    assert "model.onnx`" in refused(tmp_path / "model.onnx", DamagedModelError).message


def test_a_truncated_file(tmp_path):
    path = hand_made(tmp_path, [conv()], {"w": WEIGHT})
    path.write_bytes(path.read_bytes()[:300])
    assert "protobuf cannot be parsed" in refused(path, DamagedModelError).message


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read" in refused(tmp_path / "none.onnx").message


def test_a_model_that_is_quantized_already(tmp_path, files):
    found = OnnxGraph.of(files / "image.onnx")
    found.rounded(static(found, torch_network("image")[1])).save(tmp_path / "model.onnx")
    assert "is quantized already: node" in refused(tmp_path / "model.onnx", Unsupported).message


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": np.zeros((2, 4, 9), np.float32)}, "`x` of"),
        ({"x": np.zeros((2, 5, 8, 8), np.float32)}, "takes any×4×8×8; the data is 2×5×8×8"),
        ({"pixels": np.zeros((2, 4, 8, 8), np.float32)}, "takes `x`, which the data lacks: it has pixels"),
    ],
    ids=["rank", "channels", "name"],
)
def test_data_that_does_not_fit(tmp_path, batch, said):
    found = OnnxGraph.of(hand_made(tmp_path, [conv()], {"w": WEIGHT}))
    with pytest.raises(QhubError) as caught:
        found.run(batch)
    assert said in caught.value.message


def test_inner_shapes_that_do_not_fit_name_the_node(tmp_path):
    path = hand_made(tmp_path, [conv()], {"w": WEIGHT}, shape=("batch", "channels", 8, 8))
    with pytest.raises(QhubError, match="the_conv"):
        OnnxGraph.of(path).run({"x": np.zeros((1, 5, 8, 8), np.float32)})


def test_other_outputs_than_were_written_are_damage(files):
    with pytest.raises(DamagedModelError, match="which is not what was written"):
        OnnxGraph.load(files / "image.onnx", outputs=("other",))


def test_unsigned_zero_weights_keep_codes(tmp_path):
    found = OnnxGraph.of(hand_made(tmp_path, [conv()], {"w": WEIGHT * 0}))
    tensor = round_to_nearest(found.weight("w"))
    rounded = found.rounded(Quantization({"w": tensor}))
    assert torch.equal(rounded.layers({"w": 8})["w"].codes, tensor.codes)
    assert not rounded.run(X)[0].any()
