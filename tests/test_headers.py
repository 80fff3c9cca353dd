"""Model files of one piece → `ModelProfile`: what each format says, read from small files made by hand and by torch."""

from __future__ import annotations

import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import model_files as made
import pytest
from model_files import ARRAY, BOOL, I32, STRING, U32

from qhub.errors import DamagedModelError, QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.profile import profile

PLUGINS = Plugins.load([])
ASSETS = Path(__file__).parent.parent.parent / "shared" / "assets"


def look(path):
    return profile(str(path), PLUGINS)


def kinds(found):
    return dict(Counter(layer.kind for layer in found.layers))


def shape_of(found, name):
    return next(layer.shape for layer in found.layers if layer.name == name)


# GGUF
def test_a_gguf_llama_is_profiled(tmp_path):
    found = look(made.llama_gguf(tmp_path / "m.gguf"))
    assert (found.format, found.task, found.architecture, found.quantization) == ("gguf", "llm", "llama", "gguf q4_k")
    assert (found.blocks, found.hidden_size, found.vocabulary, found.context_length) == (2, 256, 64, 2048)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 2 * 64
    assert (found.has_tokenizer, found.tied_embeddings, found.complete) == (True, True, True)
    assert kinds(found) == {"embedding": 1, "norm": 3, "linear": 12}
    assert shape_of(found, "blk.1.ffn_down.weight") == (256, 512)
    assert found.parameters == 64 * 256 + 256 * 3 + 2 * (256 * 256 * 2 + 128 * 256 * 2 + 2 * 256 * 512)
    linear = sum(layer.bytes for layer in found.linears())
    assert linear == 2 * (256 * 256 * 2 + 128 * 256 * 2 + 2 * 256 * 512) * 144 // 256


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype"),
    [(made.F16, None, "fp16"), (made.BF16, None, "bf16"), (made.Q4_0, "gguf q4_0", "q4_0"), (made.Q8_0, "gguf q8_0", "q8_0")],
)
def test_a_gguf_of_floats_is_not_quantized(tmp_path, kind, quantization, dtype):
    found = look(made.llama_gguf(tmp_path / "m.gguf", kind))
    assert (found.quantization, max(found.linears(), key=lambda layer: layer.bytes).dtype) == (quantization, dtype)


@pytest.mark.parametrize(
    ("metadata", "task"),
    [
        ({"general.architecture": (STRING, "bert")}, "embedding"),
        ({"llama.pooling_type": (U32, 1)}, "embedding"),
        ({"llama.attention.causal": (BOOL, False)}, "embedding"),
        ({"general.architecture": (STRING, "t5")}, "nlp"),
        ({"general.architecture": (STRING, "never-heard-of")}, "unknown"),
    ],
    ids=str,
)
def test_a_gguf_is_for_what_its_metadata_says(tmp_path, metadata, task):
    assert look(made.llama_gguf(tmp_path / "m.gguf", **metadata)).task == task


def test_a_gguf_with_another_number_of_heads_in_each_block_and_wide_heads(tmp_path):
    more = {"llama.attention.head_count_kv": (ARRAY, (I32, [2, 0])), "llama.attention.key_length": (U32, 96)}
    assert look(made.llama_gguf(tmp_path / "m.gguf", **more)).kv_bytes_per_token == 2 * (2 + 0) * (96 + 96)


def test_a_gguf_of_experts(tmp_path):
    metadata = {"general.architecture": (STRING, "x"), "x.expert_count": (U32, 4), "x.expert_used_count": (U32, 2)}
    tensors = {
        "blk.0.ffn_up_exps.weight": (made.Q8_0, (32, 64, 4)),
        "blk.0.ffn_gate_inp.weight": (made.F32, (32, 4)),
        "output.weight": (1, (32, 8)),
    }
    found = look(made.gguf(tmp_path / "m.gguf", metadata, tensors))
    assert (found.experts, found.experts_per_token) == (4, 2)
    assert [(layer.kind, layer.shape) for layer in found.layers] == [("expert", (4, 64, 32)), ("other", (4, 32)), ("head", (8, 32))]


def test_a_gguf_that_was_split_is_one_model(tmp_path):
    for index in (1, 2):
        metadata = {"general.architecture": (STRING, "x"), "split.count": (2, 2), "split.no": (2, index - 1)}
        made.gguf(tmp_path / f"m-0000{index}-of-00002.gguf", metadata, {f"blk.{index}.a.weight": (0, (4, 4))})
    assert look(tmp_path / "m-00002-of-00002.gguf").parameters == 32
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(QhubError, match=r"m-00001-of-00002\.gguf` does not exist"):
        look(tmp_path / "m-00002-of-00002.gguf")


# ONNX
def test_an_onnx_network_of_convolutions_is_profiled(tmp_path):
    found = look(made.cnn_onnx(tmp_path / "m.onnx"))
    assert (found.format, found.task, found.dtype, found.quantization) == ("onnx", "vision", "fp32", None)
    assert kinds(found) == {"conv": 2, "other": 2, "head": 1}
    assert found.parameters == 8 * 27 + 8 + 16 * 72 + 160 + 10
    assert found.weight_bytes == 4 * found.parameters
    assert (found.architecture, found.blocks, found.kv_bytes_per_token) == ("unknown", None, None)


def test_matrices_of_onnx_are_named_after_their_modules_and_turned(tmp_path):
    node = made.onnx_node("MatMul", ("h", "onnx::MatMul_7"), ("y",), "/model/layers.3/mlp/up_proj/MatMul")
    extra = made.onnx_node("Gather", ("model.embed.weight", "ids"), ("h",))
    tensors = [made.onnx_tensor("onnx::MatMul_7", (8, 32), 10), made.onnx_tensor("model.embed.weight", (50, 8))]
    found = look(made.onnx(tmp_path / "m.onnx", [extra, node], [*tensors, made.onnx_tensor("axes", (2,), 7), made.onnx_tensor("eps", ())]))
    assert {layer.name: (layer.kind, layer.shape, layer.block) for layer in found.layers} == {
        "model.layers.3.mlp.up_proj.weight": ("linear", (32, 8), 3),
        "model.embed.weight": ("embedding", (50, 8), None),
    }
    assert found.blocks == 1


def test_quantized_onnx_networks_are_recognised(tmp_path):
    qdq = made.onnx(
        tmp_path / "qdq.onnx",
        [made.onnx_node("DequantizeLinear", ("w", "s", "z"), ("f",)), made.onnx_node("Conv", ("x", "f"), ("y",))],
        [made.onnx_tensor("w", (8, 3, 3, 3), 3), made.onnx_tensor("s", (8,)), made.onnx_tensor("z", (8,), 3)],
    )
    qop = made.onnx(
        tmp_path / "qop.onnx",
        [made.onnx_node("QLinearConv", ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"), ("y",))],
        [made.onnx_tensor("w", (8, 3, 3, 3), 3), made.onnx_tensor("b", (8,), 6), made.onnx_tensor("ws", (8,))],
    )
    nbits = made.onnx(
        tmp_path / "nbits.onnx",
        [made.onnx_node("MatMulNBits", ("x", "w", "s"), ("a",), "/layers.0/fc/MatMul", K=64, N=16, bits=4, block_size=32), b""],
        [made.onnx_tensor("w", (16, 2, 16), 2), made.onnx_tensor("s", (16, 2))],
    )
    found = {path.name: look(path) for path in (qdq, qop, nbits)}
    assert {name: (one.quantization, one.parameters, kinds(one)) for name, one in found.items()} == {
        "qdq.onnx": ("onnx QDQ", 8 * 27, {"conv": 1}),
        "qop.onnx": ("onnx QOperator", 8 * 27 + 8, {"conv": 1, "other": 1}),
        "nbits.onnx": ("onnx MatMulNBits", 16 * 64, {"linear": 1}),
    }


# What an ONNX network is for is known only where its inputs and outputs say so.
@pytest.mark.parametrize(
    ("inputs", "outputs", "task"),
    [
        ({"input_ids": (1, 8), "attention_mask": (1, 8), "past_key_values.0.key": (1, 2, 8, 4)}, {"logits": (1, 8, 9)}, "llm"),
        ({"input_ids": (1, 8), "attention_mask": (1, 8)}, {"logits": (1, 2)}, "nlp"),
        ({"input_ids": (1, 8), "attention_mask": (1, 8)}, {"logits": (1, 8, 9)}, "unknown"),
        ({"input_ids": (1, 8), "attention_mask": (1, 8)}, {"sentence_embedding": (1, 9)}, "embedding"),
        ({"input_features": (1, 80, 3000)}, {"last_hidden_state": (1, 9)}, "speech"),
        ({"sample": (1, 4, 64, 64), "timestep": (1,), "encoder_hidden_states": (1, 7, 8)}, {"out_sample": (1, 4, 64, 64)}, "generative"),
        ({"pixel_values": (1, 3, 224, 224)}, {"logits": (1, 9)}, "vision"),
        ({"images": (1, 3, 640, 640)}, {"pred_boxes": (1, 9, 4)}, "detection"),
        ({"x": (1, 49, 10, 1)}, {"y": (1, 12)}, "unknown"),
    ],
    ids=["with a cache", "one answer a text", "an answer a token", "sentence", "sound", "denoiser", "picture", "boxes", "spectrogram"],
)
def test_an_onnx_network_is_for_what_its_inputs_say(tmp_path, inputs, outputs, task):
    assert look(made.onnx(tmp_path / "m.onnx", [], [], inputs, outputs)).task == task


def test_onnx_weights_in_a_file_beside_are_measured_not_read(tmp_path):
    place = {"location": "w.bin", "offset": 4096, "length": 4 << 32}
    path = made.onnx(tmp_path / "m.onnx", [], [made.onnx_tensor("w", (1 << 16, 1 << 16), external=place)])
    with pytest.raises(QhubError, match=r"w\.bin` does not exist, which holds weights of `m\.onnx`"):
        look(path)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4096 + (4 << 32))  # a hole of 16 GiB
    assert look(path).weight_bytes == 4 << 32
    with (tmp_path / "w.bin").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DamagedModelError, match="which are not there"):
        look(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", ""])
def test_onnx_weights_outside_the_folder_are_refused(tmp_path, location):
    path = made.onnx(tmp_path / "m.onnx", [], [made.onnx_tensor("w", (2,), external={"location": location})])
    with pytest.raises(QhubError, match="names a file outside its folder"):
        look(path)


# TFLite
@pytest.mark.parametrize(
    ("kind", "static", "quantization", "dtype"),
    [(0, False, None, "fp32"), (9, False, "tflite int8 weights", "int8"), (9, True, "tflite int8 static", "int8")],
    ids=["float", "weights only", "throughout"],
)
def test_a_tflite_network_is_profiled(tmp_path, kind, static, quantization, dtype):
    found = look(made.cnn_tflite(tmp_path / "m.tflite", kind, static=static))
    assert (found.format, found.task, found.quantization, found.dtype) == ("tflite", "vision", quantization, dtype)
    assert found.parameters == 8 * 27 + 8 + 16 * 72 + 160
    assert kinds(found) == {"conv": 2, "other": 1, "head": 1}
    assert shape_of(found, "fc") == (10, 16)


def test_a_tflite_network_of_one_channel_may_hear_or_see(tmp_path):
    assert look(made.cnn_tflite(tmp_path / "m.tflite", channels=1)).task == "unknown"


# PT2
@pytest.mark.parametrize("layout", ["new", "2.8", "old"])
def test_an_exported_program_is_profiled(tmp_path, layout):
    found = look(made.cnn_pt2(tmp_path / "m.pt2", layout=layout))
    assert (found.format, found.task, found.architecture, found.dtype) == ("pt2", "vision", "Net", "fp32")
    assert (found.parameters, found.weight_bytes, found.quantization) == (1546, 4 * 1554, None)
    assert kinds(found) == {"conv": 2, "other": 2, "head": 1}


def test_an_exported_program_that_was_quantized_and_one_of_a_known_class(tmp_path):
    nodes = ("torch.ops.quantized_decomposed.quantize_per_tensor.default",)
    program = made.pt2_program({"a.weight": (2, 2)}, {"x": (1, 4)}, nodes, stack="L__self__,,m.BertForMaskedLM;b,b,m.Bert")
    found = look(made.pt2(tmp_path / "m.pt2", program))
    assert (found.quantization, found.architecture, found.task) == ("pt2e", "BertForMaskedLM", "nlp")


def test_what_torch_exports_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network, (torch.randn(1, 3, 8, 8),)), tmp_path / "m.pt2")
    found = look(tmp_path / "m.pt2")
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert (found.task, kinds(found)) == ("vision", {"conv": 2, "other": 4})
    assert found.weight_bytes == 4 * (found.parameters + 16) + 8


# What no format is.
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "m.bin"])
def test_a_pickle_that_is_given_itself_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(QhubError, match="is a pickle, which can run code when it is opened") as caught:
        look(tmp_path / name)
    assert f"torch.load('{tmp_path / name}', weights_only=True)" in caught.value.hint


def test_a_file_of_another_kind_names_those_that_are_read(tmp_path):
    (tmp_path / "m.xyz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"`\.onnx`, `\.pt2`, `\.gguf`, `\.tflite`"):
        look(tmp_path / "m.xyz")


@pytest.mark.parametrize("suffix", ["gguf", "onnx", "tflite", "pt2"])
@pytest.mark.parametrize(
    "content", [b"", b"x", b"<html>not found</html>" * 9, bytes(200), b"\xff" * 200], ids=["empty", "short", "a page", "zeros", "ones"]
)
def test_a_file_that_is_something_else_is_named(tmp_path, suffix, content):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DamagedModelError) as caught:
        look(path)
    assert caught.value.message.startswith(f"`{path}` is not a valid ")
    assert caught.value.hint == "download it again, or check how it was written"


def test_big_headers_are_read_in_a_moment(tmp_path):
    tokens = {"tokenizer.ggml.tokens": (ARRAY, (STRING, [f"token{index}" for index in range(128_000)]))}
    path = made.llama_gguf(tmp_path / "m.gguf", **tokens)
    started = time.process_time()
    assert look(path).vocabulary == 64
    assert time.process_time() - started < 2


# Batch norms are folded into these, so there are fewer parameters than were trained.
@pytest.mark.parametrize(
    ("name", "parameters", "quantization", "task"),
    [
        ("pretrainedResnet.tflite", 77_706, None, "vision"),
        ("pretrainedResnet_quant.tflite", 77_706, "tflite int8 static", "vision"),
        ("vww_96_int8.tflite", 210_850, "tflite int8 static", "vision"),
        ("kws_ref_model.tflite", 22_604, "tflite int8 static", "unknown"),
        ("ad01_fp32.tflite", 265_864, None, "unknown"),
    ],
)
def test_real_tflite_models(name, parameters, quantization, task):
    path = ASSETS / "mlperf-tiny" / "models" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = look(path)
    assert (found.parameters, found.quantization, found.task) == (parameters, quantization, task)


def test_a_program_without_what_is_needed_says_what_is_missing(tmp_path):
    program = made.pt2_program({"a.weight": (2, 2)}, {"x": (1, 4)})
    del program["graph_module"]["graph"]["tensor_values"]
    with pytest.raises(DamagedModelError, match=r"has no `graph_module\.graph\.tensor_values`"):
        look(made.pt2(tmp_path / "m.pt2", program))
    with zipfile.ZipFile(tmp_path / "n.pt2", "w") as archive:
        archive.writestr("net/version", "1")
    with pytest.raises(DamagedModelError, match="it holds `0` programs"):
        look(tmp_path / "n.pt2")
