"""`qhub inspect`: exact output, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import model_files as made
import pytest

CONFIGS = Path(__file__).parent / "configs"
FACTS = """\
                 llama
folder           {}
architecture     LlamaForCausalLM (llm)
parameters       90,432
weights          181 kB in bf16
blocks           2
context          2048 tokens
key-value cache  256 B per token at 16 bit
vocabulary       256
embeddings       tied to the head
tokenizer        yes
quantized        {}
"""
CLASSES = """
weights    tensors  parameters   stored     fp32     fp16       w8  w4-g128   w4-g32  w3-g128
linear          14      73,728   147 kB   295 kB   147 kB  73.7 kB   123 kB  42.6 kB   121 kB
embedding        1      16,384  32.8 kB  65.5 kB  32.8 kB  16.4 kB  32.8 kB  9.47 kB  32.8 kB
norm             5         320    640 B  1.28 kB    640 B    640 B    640 B    640 B    640 B
"""
MEMORY = """
blocks at  all weights  with 2048 tokens of cache
stored          181 kB                     705 kB
fp32            362 kB                     886 kB
fp16            181 kB                     705 kB
w8              107 kB                     631 kB
w4-g128         157 kB                     681 kB
w4-g32           76 kB                     600 kB
w3-g128         155 kB                     679 kB
"""


def test_inspect_says_what_a_model_is(qhub, llama):
    folder = llama()
    assert qhub("inspect", folder) == (0, FACTS.format(folder, "no") + CLASSES + MEMORY, "")


def test_inspect_prints_one_json_document(qhub, llama):
    document = json.loads(qhub("inspect", llama(), "--json").out)
    assert document["quantized"] is None
    assert (document["format"], document["complete"]) == ("safetensors", True)
    assert [(row["kind"], row["bytes"]["w8"]) for row in document["classes"]] == [("linear", 73728), ("embedding", 16384), ("norm", 640)]
    assert document["layers"][0]["name"] == "model.embed_tokens.weight"
    assert (document["memory"]["context_tokens"], document["memory"]["cache_bytes"]) == (2048, 2048 * 256)
    assert document["memory"]["at"][2] == {"precision": "fp16", "weight_bytes": 180_864, "total_bytes": 180_864 + 2048 * 256}


def test_inspect_states_memory_for_the_context_that_is_asked_for(qhub, llama):
    folder = llama()
    ran = qhub("inspect", folder, "--context", "1000")
    assert (ran.code, ran.err) == (0, "")
    assert "with 1000 tokens of cache" in ran.out
    assert "stored          181 kB                     437 kB" in ran.out
    ran = qhub("inspect", folder, "--context", "4000")
    assert (ran.code, ran.err) == (0, "warning: `llama` was made for a context of 2048 tokens, not 4000\n")
    ran = qhub("inspect", folder, "--context", "0")
    assert (ran.code, ran.out) == (2, "")


def test_inspect_lists_every_matrix(qhub, llama):
    lines = qhub("inspect", llama(), "--layers").out.split("\n\n")[-1].splitlines()
    assert lines[0].split() == ["matrix", "shape", "times"]
    assert "model.layers.*.mlp.down_proj.weight     64 × 128      2" in lines


def test_inspect_knows_what_qhub_quantized(qhub, llama):
    folder = llama(quantization_config={"quant_method": "compressed-tensors"})
    (folder / "qhub.json").write_text('{"kind": "weights", "scheme": "w4a16-g32-asym", "method": "awq"}', encoding="utf-8")
    assert qhub("inspect", folder).out.startswith(FACTS.format(folder, "compressed-tensors: awq at w4a16-g32-asym, by qhub"))
    assert json.loads(qhub("inspect", folder, "--json").out)["quantized"]["method"] == "awq"
    (folder / "qhub.json").write_text("[", encoding="utf-8")
    assert qhub("inspect", folder) == (
        1,
        "",
        f"error: `{folder}/qhub.json` is not what qhub writes\n\nhint: quantize the model again\n",
    )


MODEL = """
from pathlib import Path
from qhub import ModelSource, hookimpl

@hookimpl
def qhub_models():
    return [ModelSource(name="demo:llm", path=Path({!r}), summary="a toy")]
"""


def test_inspect_takes_the_name_of_a_model(qhub, toy_plugin, llama):
    ran = qhub("inspect", "demo:llm", env=toy_plugin("demo", MODEL.format(str(llama()))))
    assert (ran.code, ran.out.splitlines()[0].strip()) == (0, "demo:llm")


# Files of one piece, configs alone, and what cannot be told.
def test_inspect_takes_a_file(qhub, tmp_path):
    path = made.llama_gguf(tmp_path / "m.gguf")
    ran = qhub("inspect", path)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[1:5] == [
        f"file             {path}",
        "architecture     llama (llm)",
        "parameters       934,656",
        "weights          533 kB in q4_k",
    ]
    assert "quantized        gguf q4_k" in ran.out


def test_inspect_takes_a_config_alone(qhub):
    ran = qhub("inspect", CONFIGS / "llama-3-8b")
    assert (ran.code, ran.err) == (0, "")
    assert "parameters       8,030,261,248\nweights          16.1 GB in bf16, not here: from the config\n" in ran.out
    assert "w4-g128        5.73 GB                    6.26 GB" in ran.out
    ran = qhub("inspect", CONFIGS / "resnet-50", "--context", "100")
    assert ran.err == "warning: `resnet-50` has no key-value cache that could be told: --context changes nothing\n"
    assert "tokens of cache" not in ran.out


def test_inspect_says_what_is_unknown(qhub, model_folder):
    ran = qhub("inspect", model_folder({"architectures": ["NewForCausalLM"], "model_type": "new"}, {}))
    assert (ran.code, ran.err) == (0, "warning: the weights of `model` do not follow from its config: what they weigh is unknown\n")
    assert ran.out.splitlines()[2:8] == [
        "architecture     NewForCausalLM (llm)",
        "parameters       unknown",
        "weights          unknown",
        "blocks           unknown",
        "context          unknown",
        "key-value cache  unknown",
    ]


@pytest.mark.parametrize("name", ["m.onnx", "m.gguf", "m.tflite", "m.pt2"])
def test_inspect_names_a_damaged_file(qhub, tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>")
    ran = qhub("inspect", name)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: `{name}` is not a valid ")
    assert ran.err.endswith("\n\nhint: download it again, or check how it was written\n")
