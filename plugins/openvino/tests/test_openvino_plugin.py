"""What the plugin offers, whom it refuses, and a run from the command line to a chat."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from qhub_openvino.packing import fields, unfields, unstream
from qhub_openvino.plugin import OpenVinoExporter, OpenVinoRuntime, qhub_exporters, qhub_runtimes
from tiny_models import random_ids, tiny_model

from qhub import ModelProfile, Scheme, Target, pack
from qhub.testing import check_plugin


def profile(task="llm", path="m"):
    return ModelProfile("m", str(path), task, "M", 1, "bf16", 2)


@pytest.mark.parametrize(
    ("task", "scheme", "reason"),
    [
        ("llm", "w4a16-g128-asym", None),
        ("llm", "w3a16-channel-sym", None),
        ("llm", "w8a8-static", "`openvino` as written here does not carry scheme `w8a8-static` of a language model"),
        ("llm", "nf4", "`openvino` as written here does not carry scheme `nf4` of a language model"),
    ],
)
def test_what_is_not_carried_is_refused_with_the_reason(task, scheme, reason):
    assert OpenVinoExporter().reject(profile(task), Scheme.parse(scheme)) == reason


@pytest.mark.parametrize(("family", "refused"), [("llama", False), ("gemma2", False), ("gpt2", True), ("mixtral", True)])
def test_families_are_refused_before_anything_is_spent(family, refused):
    reason = OpenVinoExporter().reject(profile(path=tiny_model(family)), Scheme.parse("w4a16-g32-asym"))
    assert (reason is not None and f"does not run `{family}` models" in reason) == refused


@pytest.mark.parametrize(("system", "runs"), [("linux", True), ("macos", True), ("windows", True), ("android", False), ("none", False)])
def test_it_runs_where_there_are_wheels(system, runs):
    assert (OpenVinoRuntime().reject(Target("t", "t", system, "x86_64")) is None) == runs


def test_it_is_offered_and_its_declaration_imports_nothing_heavy():
    assert [(one.name, one.format) for one in qhub_exporters()] == [("openvino", "openvino")]
    assert [one.formats for one in qhub_runtimes()] == [("openvino",)]
    heavy = "{'torch', 'transformers', 'openvino', 'nncf'} & {*sys.modules}"
    code = f"import sys, qhub_openvino.plugin as p; p.qhub_exporters(), p.qhub_runtimes(); print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_importing_openvino_reports_to_nobody():
    code = "import sys, qhub_openvino.vendor; print([name for name in sys.modules if 'openvino_telemetry.' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_conformance_kit_passes():
    check_plugin("openvino")


# How codes lie in a constant.
@pytest.mark.parametrize("width", [4, 8])
def test_fields_and_their_inverse_agree_for_any_count(width):
    codes = (random_ids(3, 7).numpy() % (1 << width)).astype("uint8")
    assert (unfields(fields(codes, width), width, 21) == codes.reshape(-1)).all()
    assert fields(codes, width).shape == (-(-21 * width // 8),)


def test_the_first_code_is_in_the_lowest_bits():
    assert fields(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_of_a_quantized_model_are_unpacked(bits):
    codes = (random_ids(5, 72) % (1 << bits)).to(torch.uint8)
    stream = pack(codes, bits).numpy().view("uint8").reshape(5, -1)
    assert (unstream(stream, bits, 72) == codes.numpy()).all()


# From the command line.
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny Llama, its report, and a function for further commands."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(chr(33 + code % 90) for code in random_ids(1, 4000)[0].tolist()), encoding="utf-8")

    def qhub(*arguments, given=None):
        command = [sys.executable, "-m", "qhub", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, check=False)

    options = ["--plugin", "rtn", "--plugin", "openvino", "--scheme", "w4a16-g32-asym", "--eval", "text.txt", "--seq-len", "32"]
    ran = qhub("run", tiny_model("llama"), *options, "--max-drop", "99", "--out", "run", "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), qhub


def test_a_run_ends_with_an_artifact_whose_codes_and_logits_were_compared(run):
    (artifact,) = run[0]["artifacts"]
    assert (artifact["format"], artifact["path"]) == ("openvino", "artifact/openvino")
    parity = artifact["parity"]
    assert (parity["checked"], parity["codes_identical"], parity["top1_agreement"]) == (True, True, 1.0)
    assert parity["max_abs_diff"] < 1e-4
    assert parity["how"].startswith("opened with `openvino` (exact path); logits of")


def test_bench_takes_the_engine_that_knows_the_format(run):
    ran = run[1]("bench", "run/artifact/openvino", "--threads", "1", "--prompt", "16", "--generate", "8", "--rounds", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    (figures,) = json.loads(ran.stdout)["runs"]
    assert figures["runtime"] == "openvino"
    assert figures["generate_tokens_per_s"] > 0


def test_chat_talks_to_the_artifact(run):
    ran = run[1]("chat", "run/artifact/openvino", "--max-tokens", "5", "--temperature", "0", given="abc\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
