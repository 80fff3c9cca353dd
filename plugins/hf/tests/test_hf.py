"""`hf`: the export is the QuantizedModel's own files; the session is transformers, and computes qhub's reference."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from qhub_hf.plugin import FORMAT, AwqExporter, GptqExporter, GptqV2Exporter, HfExporter, HfRuntime, qhub_exporters, qhub_runtimes
from tiny_models import quantize, quantized_logits, random_ids, tiny_model

from qhub import (
    LayerShape,
    ModelProfile,
    OpenOptions,
    QuantizedModel,
    QuantizedWeights,
    Quantizer,
    Recipe,
    Scheme,
    Target,
    Unsupported,
    folder_digest,
    quantize_rtn,
)

IDS = random_ids(2, 32)
RECIPE = Recipe("tiny", "tiny", "", "host", "nearest", "w4a16-g32-asym")


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A QuantizedModel of a tiny Llama."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize(tiny_model("llama"), folder, Nearest(), "w4a16-g32-asym")
    return QuantizedModel(folder / "model", "weights", "w4a16-g32-asym", "nearest")


@pytest.fixture
def session(quantized):
    """It, opened."""
    opened = HfRuntime().open(quantized.path)
    yield opened
    if hasattr(opened, "model"):
        opened.close()


@pytest.fixture
def out(tmp_path):
    """An empty directory."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_export_links_the_files_and_takes_no_more_disk(quantized, out):
    artifact = HfExporter().export(quantized, out, RECIPE)
    assert content(out) == content(quantized.path)
    assert all(path.samefile(quantized.path / path.name) for path in out.iterdir())
    assert (artifact.path, artifact.format) == (out, "compressed-tensors")
    assert (artifact.bytes, artifact.sha256) == folder_digest(quantized.path)
    assert artifact.bytes == sum(path.stat().st_size for path in out.iterdir())


def test_the_export_copies_where_links_do_not_work(quantized, out, monkeypatch):
    def no_link(_source, _target):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_link)
    artifact = HfExporter().export(quantized, out, RECIPE)
    assert content(out) == content(quantized.path)
    assert not any(path.samefile(quantized.path / path.name) for path in out.iterdir())
    assert (artifact.bytes, artifact.sha256) == folder_digest(quantized.path)


def profile(task):
    return ModelProfile("m", "m", task, "M", 1, "bf16", 2)


@pytest.mark.parametrize("scheme", ["w4a16-g128-asym", "w3a16-g32-sym", "w8a16", "w2a16-channel-asym"])
def test_every_weight_only_integer_scheme_is_carried(scheme):
    assert HfExporter().reject(profile("llm"), Scheme.parse(scheme)) is None


@pytest.mark.parametrize(
    ("task", "scheme", "reason"),
    [
        ("vision", "w4a16-g32-asym", "`compressed-tensors` folders hold language models; this is `vision`"),
        ("llm", "w8a8-static", "`compressed-tensors` as written here does not carry scheme `w8a8-static`"),
        ("llm", "fp16", "`compressed-tensors` as written here does not carry scheme `fp16`"),
        ("llm", "nf4", "`compressed-tensors` as written here does not carry scheme `nf4`"),
    ],
)
def test_what_it_does_not_carry_it_refuses_with_the_reason(task, scheme, reason):
    assert HfExporter().reject(profile(task), Scheme.parse(scheme)) == reason


# The other layouts: the same numbers, or a reason.
LAYOUTS = pytest.mark.parametrize("exporter", [AwqExporter(), GptqExporter(), GptqV2Exporter()], ids=lambda exporter: exporter.name)


@LAYOUTS
def test_another_layout_holds_the_same_numbers(quantized, out, exporter):
    """The zeros of v1 are one less, so this reads each file by its own rule."""
    artifact = exporter.export(quantized, out, RECIPE)
    assert (artifact.path, artifact.format) == (out, exporter.format)
    assert (artifact.bytes, artifact.sha256) == folder_digest(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (exporter.format.partition("_")[0], 4, 32)
    tensors, own = load_all(out), QuantizedWeights(quantized.path)
    assert {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")} == own.schemes.keys()
    for name in own.schemes:
        assert torch.equal(tensors[f"{name}.scales"].t().float(), own.layer(name).scale)
        nibbles = [int(word) >> shift & 15 for word in tensors[f"{name}.qzeros"][0, :1] for shift in range(0, 32, 4)]
        order = (0, 2, 4, 6, 1, 3, 5, 7) if exporter.format == "awq" else range(8)
        less = 1 if exporter.format == "gptq" else 0
        assert nibbles == [int(own.layer(name).zero[output, 0]) - less for output in order]


def load_all(folder):
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def linear(*shape):
    layer = LayerShape("model.layers.0.fc.weight", "linear", shape, "bf16", 0, 0)
    return ModelProfile("m", "m", "llm", "M", 1, "bf16", 2, (layer,))


@pytest.mark.parametrize(
    ("exporter", "model", "scheme", "reason"),
    [
        (AwqExporter(), linear(64, 64), "w4a16-g64-asym", None),
        (AwqExporter(), linear(64, 64), "w4a16", None),
        (AwqExporter(), linear(64, 64), "w3a16-g64-asym", "`awq` has 4 bits; it does not carry scheme `w3a16-g64-asym`"),
        (AwqExporter(), linear(64, 64), "w8a8-static", "`awq` has 4 bits; it does not carry scheme `w8a8-static`"),
        (AwqExporter(), linear(60, 64), "w4a16-g64-asym",
         "`awq` needs multiples of 8 outputs and 1 inputs; `model.layers.0.fc.weight` is 60 × 64"),
        (AwqExporter(), linear(60, 70), "w4a16-g64-asym", None),  # 64 does not divide 70: the layer stays float
        (AwqExporter(), profile("vision"), "w4a16-g64-asym", "`awq` folders hold language models; this is `vision`"),
        (GptqExporter(), linear(64, 64), "w3a16-g64-asym", None),
        (GptqExporter(), linear(64, 64), "w5a16-g64-asym", "`gptq` has 2, 3, 4, 8 bits; it does not carry scheme `w5a16-g64-asym`"),
        (GptqV2Exporter(), linear(72, 64), "w8a16",
         "`gptq_v2` needs multiples of 32 outputs and 32 inputs; `model.layers.0.fc.weight` is 72 × 64"),
    ],
)  # fmt: skip
def test_what_another_layout_lacks_is_known_before_anything_is_spent(exporter, model, scheme, reason):
    assert exporter.reject(model, Scheme.parse(scheme)) == reason


def test_what_only_shows_while_it_is_written_is_refused_then(tmp_path, out):
    quantize(tiny_model("llama"), tmp_path, Nearest(), "w4a16-g32-asym", overrides={"down_proj": "w4a16-g64-asym"})
    model = QuantizedModel(tmp_path / "model", "weights", "w4a16-g32-asym", "nearest")
    with pytest.raises(Unsupported, match="AWQ has one group size; these layers have 32, 64"):
        AwqExporter().export(model, out, RECIPE)


@pytest.mark.parametrize(
    ("system", "reason"),
    [("linux", None), ("macos", None), ("windows", None), ("android", "transformers does not run on `android`"),
     ("none", "transformers does not run on `none`")],
)  # fmt: skip
def test_it_runs_where_python_with_torch_runs(system, reason):
    assert HfRuntime().reject(Target("t", "t", system, "aarch64")) == reason


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("w4a16-g32-asym", {}),
        ("w4a16-g32-sym", {}),
        ("w4a16-g64-sym", {"down_proj": "w8a16", "o_proj": "float"}),
        ("w4a16-g64-asym", {"down_proj": "w8a16-g32-asym", "q_proj": "w3a16-channel-asym", "v_proj": "w8a16"}),
    ],
    ids=["asymmetric", "symmetric", "mixed", "mixed asymmetric"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sessions_logits_are_the_reference(tmp_path, scheme, overrides, dtype):
    quantize(tiny_model("llama", dtype), tmp_path, Nearest(), scheme, overrides=overrides)
    session = HfRuntime().open(tmp_path / "model")
    found = session.logits(IDS.numpy())
    session.close()
    assert (found.dtype, found.shape) == (np.float32, (2, 32, 128))
    assert np.array_equal(found, quantized_logits(tmp_path / "model", IDS).numpy())


def greedy(session, ids, count):
    """Greedy continuation by the logits alone, without a cache."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(session.logits(np.array([tokens]))[0, -1].argmax()))
    return tokens[len(ids) :]


def test_greedy_generation_takes_the_most_probable_token_each_time(session):
    prompt = IDS[0, :10].tolist()
    found = list(session.generate(prompt, 12))
    assert len(found) == 12
    assert found == greedy(session, prompt, 12)
    assert found == list(session.generate(prompt, 12))


def test_sampling_is_decided_by_its_seed_and_leaves_the_global_one_alone(session):
    prompt, state = IDS[0, :10].tolist(), torch.random.get_rng_state()
    one, again, other = (list(session.generate(prompt, 12, temperature=5.0, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_generation_ends_at_the_end_token(quantized, tmp_path):
    """Whatever the model says fourth is made its end token, alone or as one of several."""
    for stop in (lambda token: token, lambda token: [127, token]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        HfExporter().export(quantized, folder, RECIPE)
        session = HfRuntime().open(folder)
        said = list(session.generate(IDS[0, :10].tolist(), 8))
        session.close()
        path = folder / "generation_config.json"
        changed = json.loads(path.read_text()) | {"eos_token_id": stop(said[3])}
        path.unlink()  # it is a link
        path.write_text(json.dumps(changed))
        session = HfRuntime().open(folder)
        assert list(session.generate(IDS[0, :10].tolist(), 8)) == said[: said.index(said[3])]
        assert list(session.generate(IDS[0, :10].tolist(), 8, until_stop=False)) == said
        session.close()


def test_a_closed_session_holds_no_model(session):
    session.close()
    assert not hasattr(session, "model")


def test_it_is_offered_and_its_declaration_imports_nothing_heavy():
    offered = [(exporter.name, exporter.format) for exporter in qhub_exporters()]
    assert offered == [("hf", FORMAT), ("hf-awq", "awq"), ("hf-gptq", "gptq"), ("hf-gptq-v2", "gptq_v2")]
    assert [runtime.formats for runtime in qhub_runtimes()] == [(FORMAT,)]
    code = "import sys, qhub_hf.plugin as p; p.qhub_exporters(), p.qhub_runtimes(); print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_loading_and_running_say_nothing(quantized, capfd):
    session = HfRuntime().open(quantized.path)
    session.logits(IDS.numpy())
    list(session.generate([1, 2, 3], 2))
    session.close()
    assert capfd.readouterr() == ("", "")


def test_a_run_that_names_a_layout_says_what_was_checked(tmp_path):
    """No engine for it is installed, so nothing is claimed but what was read back."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + code % 90) for code in random_ids(1, 4000)[0].tolist()), encoding="utf-8")
    options = ["--plugin", "rtn", "--plugin", "hf-gptq", "--scheme", "w4a16-g32-sym", "--eval", text, "--seq-len", "32", "--max-drop", "99"]
    command = [sys.executable, "-m", "qhub", "run", tiny_model("llama"), *options, "--out", tmp_path / "run", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (artifact,) = json.loads(ran.stdout)["artifacts"]
    assert (artifact["format"], artifact["path"]) == ("gptq", "artifact/gptq")
    assert "nothing installed runs `gptq` on `host`: the run ends with that artifact, and does not open it" in ran.stderr
    assert "QuantizedModel" not in ran.stderr
    why = "a runtime for this format is not installed here; codes, scales and zeros read back from the file: the same"
    unknown = {"max_abs_diff": None, "top1_agreement": None}
    assert artifact["parity"] == {"checked": False, "codes_identical": True, "how": why, **unknown}


def test_top_p_leaves_only_the_most_probable_tokens(quantized):
    session = HfRuntime().open(quantized.path)
    greedy = list(session.generate(IDS[0, :10].tolist(), 8))
    assert list(session.generate(IDS[0, :10].tolist(), 8, temperature=5.0, top_p=1e-6, seed=3)) == greedy
    assert list(session.generate(IDS[0, :10].tolist(), 8, temperature=5.0, top_p=1.0, seed=3)) != greedy


def test_options_choose_threads_and_float32(quantized):
    before = torch.get_num_threads()
    try:
        session = HfRuntime().open(quantized.path, OpenOptions(threads=1, exact=True))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert {parameter.dtype for parameter in session.model.parameters() if parameter.is_floating_point()} == {torch.float32}


def test_a_kernel_cannot_be_chosen(quantized):
    with pytest.raises(Unsupported, match="`hf` has no kernel `avx2`: torch chooses its own"):
        HfRuntime().open(quantized.path, OpenOptions(kernel="avx2"))
