"""Networks that are no language models: written as ONNX folders, read back, and run by ONNX Runtime."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from qhub_onnxruntime.plugin import OnnxExporter, OnnxRuntime, QdqExporter
from tiny_graphs import residual, static

from qhub import ModelProfile, OpenOptions, QhubError, QuantizedModel, Recipe, Scheme, Unsupported, is_graph

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch calls it itself, when a program is copied
RECIPE = Recipe("m", "m", "", "host", "static", "w8a8-static")
PROFILE = ModelProfile("m", "m", "vision", "ResNet", 1, "fp32", 4)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A QuantizedModel folder of an image network, what was decided, and a batch."""
    folder = tmp_path_factory.mktemp("quantized")
    graph, batch = residual()
    decided = static(graph, batch)
    graph.rounded(decided).save(folder / "model.pt2")
    inputs = [{"name": "image", "shape": [-1, 3, 8, 8], "dtype": "float32"}]
    metadata = {"kind": "graph", "file": "model.pt2", "recipe_digest": "abc", "inputs": inputs, "outputs": ["logits"]}
    (folder / "qhub.json").write_text(json.dumps(metadata))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder, decided, graph.rounded(decided), batch


@pytest.fixture(scope="module")
def artifact(quantized, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact")
    made = OnnxExporter().export(QuantizedModel(quantized[0], "graph", "w8a8-static", "static"), out, RECIPE)
    assert (made.format, made.path) == ("onnx", out)
    return out


def test_the_folder_holds_the_network_and_what_feeds_it(artifact):
    assert sorted(path.name for path in artifact.iterdir()) == ["model.onnx", "preprocessor_config.json", "qhub.json"]
    assert {item.key: item.value for item in onnx.load(artifact / "model.onnx").metadata_props}["qhub.recipe"] == "abc"


def test_codes_scales_and_zeros_are_read_back_the_same(artifact, quantized):
    found = OnnxExporter().read_layers(artifact)
    assert is_graph(artifact)
    for layer, tensor in quantized[1].weights.items():
        assert torch.equal(found[layer].codes, tensor.codes)
        assert torch.equal(found[layer].scale, tensor.scale)
        assert torch.equal(found[layer].zero, tensor.zero)


@pytest.mark.parametrize("threads", [1, 2])
def test_it_runs_any_batch(artifact, quantized, threads):
    session = OnnxRuntime().open_graph(artifact, OpenOptions(threads=threads))
    assert [(item.name, item.shape, item.dtype) for item in session.inputs] == [("image", (-1, 3, 8, 8), "float32")]
    assert session.outputs == ("logits",)
    for items in (1, 6):
        batch = {"image": quantized[3]["image"][:items]}
        expected = quantized[2].run(batch)[0].numpy()
        assert np.abs(session.run(batch)[0] - expected).max() < 0.05 * np.abs(expected).max()
    session.close()


def test_exact_is_closer_or_as_close(artifact, quantized):
    expected = quantized[2].run(quantized[3])[0].numpy()
    found = OnnxRuntime().open_graph(artifact, OpenOptions(exact=True)).run(quantized[3])[0]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_network_that_is_onnx_already_is_copied(artifact, quantized, tmp_path):
    OnnxExporter().export(QuantizedModel(artifact, "graph", "w8a8-static", "static"), tmp_path, RECIPE)
    assert (tmp_path / "model.onnx").read_bytes() == (artifact / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"picture": np.zeros((1, 3, 8, 8), np.float32)}, "takes `image`, which the batch lacks: it has picture"),
        ({"image": np.zeros((1, 3, 9, 8), np.float32)}, "takes any×3×8×8; the data is 1×3×9×8"),
        ({"image": np.zeros((3, 8, 8), np.float32)}, "takes any×3×8×8; the data is 3×8×8"),
    ],
    ids=["another name", "another size", "no batch axis"],
)
def test_data_that_does_not_fit_is_refused_with_the_shapes(artifact, batch, said):
    with pytest.raises(QhubError) as refused:
        OnnxRuntime().open_graph(artifact).run(batch)
    assert said in refused.value.message


def test_a_missing_or_damaged_file_is_one_clear_error(tmp_path, artifact):
    with pytest.raises(Unsupported, match="does not exist"):
        OnnxRuntime().open_graph(tmp_path)
    (tmp_path / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes()[:500])
    with pytest.raises(QhubError, match="ONNX Runtime does not open"):
        OnnxRuntime().open_graph(tmp_path)


def test_a_forced_kernel_is_refused(artifact):
    with pytest.raises(Unsupported, match="no kernel `avx2`"):
        OnnxRuntime().open_graph(artifact, OpenOptions(kernel="avx2"))


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(QhubError, match=r"has neither `model\.pt2` nor `model\.onnx`"):
        OnnxExporter().export(QuantizedModel(tmp_path, "graph", "w8a8-static", "static"), tmp_path / "out", RECIPE)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a8-static", "w8a8-dynamic", "w8a16", "fp16"])
def test_the_exporter_takes_networks_at_schemes_of_one_scale_per_output(scheme):
    assert OnnxExporter().reject(PROFILE, Scheme.parse(scheme)) is None
    assert "holds language models" in (QdqExporter().reject(PROFILE, Scheme.parse(scheme)) or "")


def test_groups_are_refused_for_networks():
    assert "one scale per output" in (OnnxExporter().reject(PROFILE, Scheme.parse("w4a16-g128-asym")) or "")
