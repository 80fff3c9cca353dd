"""Networks that are no language models: written as IR, read back, and run by OpenVINO."""

import json
import shutil

import numpy as np
import pytest
import torch
from qhub_openvino.plugin import OpenVinoExporter, OpenVinoRuntime
from qhub_openvino.vendor import ov
from tiny_graphs import dynamic, encoder, residual, static

from qhub import ModelProfile, OpenOptions, QhubError, Quantization, QuantizedModel, Recipe, Scheme, Unsupported, UsageError, is_graph

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch calls it itself, when a program is copied
RECIPE = Recipe("m", "m", "", "host", "static", "w8a8-static")
LAYERS = ("first", "second", "third", "linear")
DECIDE = {
    "residual static": (residual, static),
    "residual w4a8": (residual, lambda graph, batch: static(graph, batch, (4, 8))),
    "residual symmetric": (residual, lambda graph, batch: static(graph, batch, symmetric=True)),
    "encoder static": (encoder, static),
    "encoder dynamic": (encoder, lambda graph, batch: dynamic(graph)),
    "residual fp16": (residual, lambda graph, batch: Quantization(casts=dict.fromkeys(LAYERS, "float16"))),
    "residual bf16": (residual, lambda graph, batch: Quantization(casts=dict.fromkeys(LAYERS, "bfloat16"))),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name → (folder of the artifact, what was decided, the rounded graph, a batch), made once."""
    found = {}

    def make(name):
        if name not in found:
            network, decide = DECIDE[name]
            graph, batch = network()
            decided = decide(graph, batch)
            source, out = tmp_path_factory.mktemp("quantized"), tmp_path_factory.mktemp("artifact")
            rounded = graph.rounded(decided)
            rounded.save(source / "model.pt2")
            inputs = [{"name": item.name, "shape": list(item.shape), "dtype": item.dtype} for item in graph.inputs]
            facts = {"kind": "graph", "file": "model.pt2", "inputs": inputs, "outputs": ["logits"], "casts": dict(decided.casts)}
            (source / "qhub.json").write_text(json.dumps(facts))
            (source / "config.json").write_text("{}")
            OpenVinoExporter().export(QuantizedModel(source, "graph", "w8a8-static", "static"), out, RECIPE)
            found[name] = out, decided, rounded, batch
        return found[name]

    return make


@pytest.mark.parametrize("name", DECIDE)
def test_codes_scales_and_zeros_are_read_back_the_same(name, made):
    artifact, decided, _, _ = made(name)
    found = OpenVinoExporter().read_layers(artifact)
    assert is_graph(artifact)
    assert found.keys() == decided.weights.keys()
    for layer, tensor in decided.weights.items():
        assert torch.equal(found[layer].codes, tensor.codes)
        assert torch.equal(found[layer].scale, tensor.scale)
        assert torch.equal(found[layer].zero, tensor.zero)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "as it is fast"])
@pytest.mark.parametrize("name", DECIDE)
def test_outputs_are_those_of_the_reference(name, exact, made):
    artifact, _, rounded, batch = made(name)
    session = OpenVinoRuntime().open_graph(artifact, OpenOptions(threads=1, exact=exact))
    assert [(item.name, item.shape, item.dtype) for item in session.inputs] == [(i.name, i.shape, i.dtype) for i in rounded.inputs]
    assert session.outputs == ("logits",)
    for items in (1, 3):
        some = {key: values[:items] for key, values in batch.items()}
        expected = rounded.run(some)[0].numpy()
        assert np.abs(session.run(some)[0] - expected).max() < 0.05 * np.abs(expected).max()
    session.close()


def types(artifact):
    model = ov.Core().read_model(artifact / "openvino_model.xml")
    nodes = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {node.get_friendly_name(): node.get_element_type().get_type_name() for node in nodes}


@pytest.mark.parametrize(("name", "kind"), [("residual static", "i8"), ("residual w4a8", "i4"), ("encoder dynamic", "i8")])
def test_weights_stay_integers_in_the_file(name, kind, made):
    found = types(made(name)[0])
    assert {found[f"{layer}.weight_codes"] for layer in made(name)[1].weights} == {kind}


@pytest.mark.parametrize(("name", "kind"), [("residual fp16", "f16"), ("residual bf16", "bf16")])
def test_weights_in_sixteen_bits_stay_so_in_the_file(name, kind, made):
    assert [*types(made(name)[0]).values()].count(kind) >= len(LAYERS)


def test_convolutions_and_products_compute_in_integers(made):
    session = OpenVinoRuntime().open_graph(made("residual static")[0], OpenOptions(threads=1))
    nodes = [node.get_rt_info() for node in session._request.get_compiled_model().get_runtime_model().get_ops()]
    kinds = [(node["layerType"].astype(str), node["runtimePrecision"].astype(str)) for node in nodes]
    computed = [precision for kind, precision in kinds if kind in ("Convolution", "FullyConnected")]
    assert len(computed) == 4
    assert set(computed) <= {"u8", "i8"}


def test_a_pair_of_quantize_and_dequantize_is_one_operation_and_moves_are_not_rounded_again(made):
    nodes = ov.Core().read_model(made("residual static")[0] / "openvino_model.xml").get_ops()
    kinds = [node.get_type_name() for node in nodes]
    assert kinds.count("FakeQuantize") == 6  # image, three convolutions, sum, average; not the cut and padded shortcut
    assert kinds.count("Subtract") == 0
    assert kinds.count("Convert") == 4  # of weights


def test_rows_are_rounded_in_the_largest_groups_that_all_dynamic_layers_have(made):
    session = OpenVinoRuntime().open_graph(made("encoder dynamic")[0])
    assert session._request.get_compiled_model().get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"picture": np.zeros((1, 3, 8, 8), np.float32)}, "takes `image`, which the batch lacks: it has picture"),
        ({"image": np.zeros((1, 3, 9, 8), np.float32)}, "takes any×3×8×8; the data is 1×3×9×8"),
        ({"image": np.zeros((3, 8, 8), np.float32)}, "takes any×3×8×8; the data is 3×8×8"),
    ],
    ids=["another name", "another size", "no batch axis"],
)
def test_data_that_does_not_fit_is_refused_with_the_shapes(batch, said, made):
    with pytest.raises(QhubError) as refused:
        OpenVinoRuntime().open_graph(made("residual static")[0]).run(batch)
    assert said in refused.value.message


def test_missing_and_damaged_files_are_one_clear_error_each(made, tmp_path):
    with pytest.raises(Unsupported, match=r"has no openvino_model\.xml"):
        OpenVinoRuntime().open_graph(tmp_path)
    copy = shutil.copytree(made("residual static")[0], tmp_path / "copy")
    (copy / "openvino_model.bin").unlink()
    with pytest.raises(QhubError, match=r"`openvino_model\.bin` is missing"):
        OpenVinoRuntime().open_graph(copy)


def test_a_device_that_is_not_there_is_refused(made):
    with pytest.raises(UsageError, match=r"no device `GPU\.7` here"):
        OpenVinoRuntime().open_graph(made("residual static")[0], OpenOptions(kernel="gpu.7"))


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(QhubError, match=r"has neither `model\.pt2` nor `model\.onnx`"):
        OpenVinoExporter().export(QuantizedModel(tmp_path, "graph", "w8a8-static", "static"), tmp_path / "out", RECIPE)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-static", "w8a8-dynamic", "w8a16", "fp16"])
def test_the_exporter_takes_networks_at_schemes_of_one_scale_per_output(scheme):
    profile = ModelProfile("m", "m", "vision", "ResNet", 1, "fp32", 4)
    assert OpenVinoExporter().reject(profile, Scheme.parse(scheme)) is None
    assert "has groups" in (OpenVinoExporter().reject(profile, Scheme.parse("w4a16-g32-asym")) or "")
