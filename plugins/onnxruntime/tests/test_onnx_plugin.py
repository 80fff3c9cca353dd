"""What the plugin offers, whom it refuses, and a run from the command line to a chat."""

import json
import shutil
import subprocess
import sys

import pytest
from onnx_models import EXPORTERS, RECIPE, exported
from qhub_onnxruntime.packing import fields, in_blocks, per_block, per_group, unfields, unstream
from qhub_onnxruntime.plugin import OnnxRuntime, qhub_exporters, qhub_runtimes
from qhub_onnxruntime.providers import serving
from qhub_onnxruntime.schemes import block_size_of
from tiny_models import random_ids, tiny_model

from qhub import ModelProfile, QuantizedModel, Scheme, Target, folder_digest, pack
from qhub.errors import DamagedModelError
from qhub.prove.parity import compare_logits


def profile(task="llm", path="m"):
    return ModelProfile("m", str(path), task, "M", 1, "bf16", 2)


@pytest.mark.parametrize(
    ("task", "scheme", "reason"),
    [
        ("llm", "w4a16-g128-asym", None),
        ("llm", "w3a16-channel-sym", None),
        ("llm", "w8a8-static", "`onnx` as written here does not carry scheme `w8a8-static` of a language model"),
        ("llm", "nf4", "`onnx` as written here does not carry scheme `nf4` of a language model"),
        ("vision", "w4a16-g32-asym", "networks as `onnx` have one scale per output; scheme `w4a16-g32-asym` has groups"),
    ],
)
def test_what_is_not_carried_is_refused_with_the_reason(task, scheme, reason):
    assert EXPORTERS[0].reject(profile(task), Scheme.parse(scheme)) == reason


@pytest.mark.parametrize(("family", "refused"), [("llama", False), ("gemma2", False), ("gpt2", True), ("mixtral", True)])
def test_families_are_refused_before_anything_is_spent(family, refused):
    reason = EXPORTERS[0].reject(profile(path=tiny_model(family)), Scheme.parse("w4a16-g32-asym"))
    assert (reason is not None and f"does not run `{family}` models" in reason) == refused


@pytest.mark.parametrize(("system", "runs"), [("linux", True), ("macos", True), ("windows", True), ("android", False), ("none", False)])
def test_it_runs_where_there_are_wheels(system, runs):
    assert (OnnxRuntime().reject(Target("t", "t", system, "aarch64")) is None) == runs


@pytest.mark.parametrize(
    ("accelerators", "found"),
    [
        ((), []),
        (("cuda-8.9",), ["TensorrtExecutionProvider", "CUDAExecutionProvider"]),
        (("hexagon-v75",), ["QNNExecutionProvider"]),
        (("metal", "ane"), ["CoreMLExecutionProvider"]),
        (("npu-xdna2",), []),
    ],
    ids=["CPU", "CUDA", "Hexagon", "Apple", "not installed"],
)
def test_providers_are_those_installed_that_serve_the_device_and_the_cpu(accelerators, found):
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "QNNExecutionProvider", "CoreMLExecutionProvider"]
    assert serving(Target("t", "t", "linux", "x86_64", accelerators=accelerators), names) == [*found, "CPUExecutionProvider"]


def test_it_is_offered_and_its_declaration_imports_nothing_heavy():
    assert [(one.name, one.format) for one in qhub_exporters()] == [("onnxruntime", "onnx"), ("onnx-qdq", "onnx-qdq")]
    assert [one.formats for one in qhub_runtimes()] == [("onnx", "onnx-qdq")]
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime'} & {*sys.modules}"
    code = f"import sys, qhub_onnxruntime.plugin as p; p.qhub_exporters(), p.qhub_runtimes(); print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = exported("llama", "w4a16-g32-asym")
    again = EXPORTERS[0].export(QuantizedModel(model.quantized, "weights", "w4a16-g32-asym", "nearest"), tmp_path, RECIPE)
    assert (again.bytes, again.sha256) == folder_digest(model.artifact)


# How codes lie in the file.
@pytest.mark.parametrize("width", [2, 4, 8])
def test_fields_and_their_inverse_agree_for_any_count(width):
    codes = (random_ids(3, 21).numpy() % (1 << width)).astype("uint8")
    assert (unfields(fields(codes, width), width, 21) == codes).all()
    assert fields(codes, width).shape == (3, -(-21 * width // 8))


def test_the_first_code_is_in_the_lowest_bits():
    import numpy as np

    assert fields(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert fields(np.array([[1, 2, 3]], np.uint8), 2).tolist() == [[0b111001]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_of_a_quantized_model_are_unpacked_and_put_in_blocks(bits):
    import torch

    codes = (random_ids(5, 72) % (1 << bits)).to(torch.uint8)
    stream = pack(codes, bits).numpy().view("uint8").reshape(5, -1)
    assert (unstream(stream, bits, 72) == codes.numpy()).all()
    width = next(width for width in (2, 4, 8) if width >= bits)
    blocks = in_blocks(stream, bits, 72, 32)  # the last block is filled up
    assert blocks.shape == (5, 3, 4 * width)
    assert (unfields(blocks.reshape(5, -1), width, 72) == codes.numpy()).all()


def test_groups_of_several_blocks_are_read_back_only_if_their_blocks_agree():
    values = random_ids(3, 4).numpy()
    spread = per_block(values, 12)
    assert (per_group(spread, 4) == values).all()
    spread[1, 4] += 1
    assert per_group(spread, 4) is None


@pytest.mark.parametrize(
    ("scheme", "inputs", "block"), [("w4a16-g256-sym", 512, 256), ("w4a16-channel-sym", 172, 128), ("w4a16-channel-sym", 8, 16)]
)
def test_blocks_are_groups_or_pieces_of_a_row(scheme, inputs, block):
    assert block_size_of(Scheme.parse(scheme), inputs) == block


# From the command line.
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny Llama: its report, a function for further commands, its folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(chr(33 + code % 90) for code in random_ids(1, 4000)[0].tolist()), encoding="utf-8")

    def qhub(*arguments, given=None):
        command = [sys.executable, "-m", "qhub", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, check=False)

    options = ["--plugin", "rtn", "--plugin", "onnxruntime", "--scheme", "w4a16-g32-asym", "--eval", "text.txt", "--seq-len", "32"]
    ran = qhub("run", tiny_model("llama"), *options, "--max-drop", "99", "--out", "run", "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), qhub, folder / "run"


def test_a_run_ends_with_an_artifact_whose_codes_and_logits_were_compared(run):
    (artifact,) = run[0]["artifacts"]
    assert (artifact["format"], artifact["path"]) == ("onnx", "artifact/onnx")
    parity = artifact["parity"]
    assert (parity["checked"], parity["codes_identical"], parity["top1_agreement"]) == (True, True, 1.0)
    assert parity["max_abs_diff"] < 1e-4
    assert parity["how"].startswith("opened with `onnxruntime` (exact path); logits of")


def test_bench_takes_the_engine_that_knows_the_format(run):
    ran = run[1]("bench", "run/artifact/onnx", "--threads", "1", "--prompt", "16", "--generate", "8", "--rounds", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    (figures,) = json.loads(ran.stdout)["runs"]
    assert figures["runtime"] == "onnxruntime"
    assert figures["generate_tokens_per_s"] > 0


def test_chat_talks_to_the_artifact(run):
    ran = run[1]("chat", "run/artifact/onnx", "--max-tokens", "5", "--temperature", "0", given="abc\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_a_file_with_one_other_code_fails_the_run_and_names_the_layer(run, tmp_path):
    import onnx

    artifact = shutil.copytree(run[2] / "artifact" / "onnx", tmp_path / "onnx")
    graph = onnx.load_model(artifact / "model.onnx", load_external_data=False).graph
    (codes,) = [tensor for tensor in graph.initializer if tensor.name == "model.layers.0.mlp.up_proj.codes"]
    data = bytearray((artifact / "model.onnx.data").read_bytes())
    data[next(int(entry.value) for entry in codes.external_data if entry.key == "offset")] ^= 16
    (artifact / "model.onnx.data").write_bytes(data)
    with pytest.raises(DamagedModelError, match=r"not those that were quantized, first in layer `model\.layers\.0\.mlp\.up_proj`"):
        compare_logits(run[2] / "quantized", artifact, OnnxRuntime(), random_ids(1, 16).numpy(), EXPORTERS[0])
