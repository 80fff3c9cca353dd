"""Bad input to `qhub run`: one clear error with a hint, the right exit code, nothing on stdout, and no trace on the disk.

Each row of the table is: what is wrong · how it is brought about · further arguments · exit code · error · hint. A run that
had begun (its plan was already shown) is marked; it too leaves nothing behind. `{here}` is the working directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from forked import Ran, needs_plugins, run, start
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

pytestmark = needs_plugins
BASE = (
    "--plugin", "gptq", "--scheme", "w4a16-g32-asym", "--calib", "text.txt", "--eval", "text.txt",
    "--samples", "4", "--seq-len", "32", "--out", "out",
)  # fmt: skip
#: What a run says before it fails: its plan, and how far it came.
PROGRESS = re.compile(r"(model|route|size|needs|out): .+|(quantize|export|verify|evaluate|report) .+|warning: .+")
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
NEW_OUT = "give a new directory: `--out DIR`"
Arrange = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One kind of bad input."""

    name: str
    arrange: Arrange
    code: int
    error: str
    hint: str
    more: Sequence[str] = ()
    model: str = "model"
    begun: bool = False
    env: dict[str, str] = field(default_factory=dict)


def nothing(_here: Path) -> None:
    """The arguments are bad, the files are good."""


def written(name: str, content: str | bytes) -> Arrange:
    """A file with this content, whatever was there."""

    def arrange(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return arrange


def without(*names: str) -> Arrange:
    """The model lacks these files."""
    return lambda here: [(here / "model" / name).unlink() for name in names]


def config(**changes: object) -> Arrange:
    """The model's config says something else; None: it does not say it."""

    def arrange(here: Path) -> None:
        path = here / "model" / "config.json"
        facts = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))

    return arrange


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Arrange:
    """The model's weights are changed."""

    def arrange(here: Path) -> None:
        path = here / "model" / WEIGHTS
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return arrange


def header(change: Callable[[dict[str, dict]], object]) -> Arrange:
    """The header of the weights is rewritten, the data stay."""

    def arrange(here: Path) -> None:
        path = here / "model" / WEIGHTS
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return arrange


def index(weight_map: dict[str, str]) -> Arrange:
    """The weights are one shard of an index."""
    return written("model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def put(name: str, position: int, value: float) -> Arrange:
    """One number of a tensor is another."""
    return tensors(lambda found: found[name].view(-1)[position].fill_(value))


def parquet(column: str, values: list) -> Arrange:
    """A parquet file with one column."""

    def arrange(here: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: values}), here / "data.parquet")

    return arrange


def interrupted(here: Path) -> None:
    """A run of the model at 8 bits that ended before its second block was noted."""
    ran = run(["run", "model", *BASE, "--scheme", "w8a16"], here, die_at="block-00001.json")
    assert ran.code == -9, ran.err


def both(*steps: Arrange) -> Arrange:
    """One after the other."""
    return lambda here: [step(here) for step in steps]


CASES = (
    # The model is not one.
    Case("no such model", nothing, 2, "", "", model="gone"),
    Case("a file instead of a folder", nothing, 2, "", "", model="model/model.safetensors"),
    Case("an empty folder", lambda here: (here / "empty").mkdir(), 1, "", "", model="empty"),
    Case("a hub id", nothing, 1, "", "", model="meta-llama/Llama-3.2-1B"),
    Case("config that is not JSON", written("model/config.json", "{"), 1, "", ""),
    Case("config that is a list", written("model/config.json", "[]"), 1, "", ""),
    Case("an architecture that nobody knows", config(model_type="foo9", architectures=["Foo9ForCausalLM"]), 3, "", "", begun=True),
    Case("no architecture at all", config(model_type=None, architectures=None), 3, "", ""),
    Case("a model that is not a language model", config(model_type="bert", architectures=["BertForMaskedLM"]), 3, "", ""),
    Case("a config that contradicts itself", config(num_attention_heads=0), 1, "", "", begun=True),
    Case("a model with code of its own", config(model_type="own", auto_map={"AutoConfig": "a.B"}), 1, "", "", begun=True),
    Case("a model that is already quantized", config(quantization_config={"quant_method": "gptq"}), 3, "", ""),
    Case("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), 1, "", ""),
    Case("a tokenizer that is not one", written("model/tokenizer.json", "{"), 1, "", "", begun=True),
    # Its weights are not what they should be.
    Case("pickles only", lambda here: (here / "model" / WEIGHTS).rename(here / "model" / "pytorch_model.bin"), 1, "", ""),
    Case("no weights", without(WEIGHTS), 1, "", ""),
    Case("truncated weights", lambda here: os.truncate(here / "model" / WEIGHTS, 100_000), 1, "", ""),
    Case("weights that are text", written(f"model/{WEIGHTS}", "not found, sorry"), 1, "", ""),
    Case("a header that lies about a size", header(lambda entries: entries[UP].update(shape=[1000, 1000])), 1, "", ""),
    Case("a header that points outside", header(lambda entries: entries[UP].update(data_offsets=[10**9, 10**9 + 32768])), 1, "", ""),
    Case("a missing shard", index({UP: "model-00002-of-00002.safetensors"}), 1, "", ""),
    Case("an index that names a tensor that is not there", index({"model.layers.9.up.weight": WEIGHTS}), 1, "", ""),
    Case("an index that leads out of the folder", index({UP: "../text.txt"}), 1, "", ""),
    Case("NaN in the last block", put(UP, 77, float("nan")), 1, "", "", begun=True),
    Case("infinity in the final norm", put("model.norm.weight", 3, float("inf")), 1, "", "", begun=True),
    Case("shapes that the config does not say", config(intermediate_size=96), 1, "", "", begun=True),
    Case("a vocabulary that the config does not say", config(vocab_size=1000), 1, "", ""),
    Case("a block too few", config(num_hidden_layers=3), 1, "", ""),
    Case("a tensor too few", tensors(lambda found: found.pop(UP)), 1, "", "", begun=True),
    # What was asked for does not exist, or does not go together.
    Case("an unknown target", nothing, 2, "", "", ["--target", "raspberry-pi"]),
    Case("an unknown scheme", nothing, 2, "", "", ["--scheme", "int4"]),
    Case("a scheme that the method does not write", nothing, 3, "", "", ["--scheme", "w8a8-static"]),
    Case("an unknown plugin", nothing, 2, "", "", ["--plugin", "int3magic"]),
    Case("a plugin that is planned", nothing, 2, "", "", ["--plugin", "mlx"]),
    Case("two quantizers that both round", nothing, 2, "", "", ["--plugin", "rtn"]),
    Case("three quantizers", nothing, 2, "", "", ["--plugin", "awq", "--plugin", "rtn"]),
    Case("a group size that divides nothing", nothing, 3, "", "", ["--scheme", "w4a16-g256-asym"]),
    Case("an override without a scheme", nothing, 2, "", "", ["--override", "down_proj"]),
    Case("an override with an unknown scheme", nothing, 2, "", "", ["--override", "down_proj=w9"]),
    Case("an override that the method does not write", nothing, 2, "", "", ["--override", "down_proj=fp16"]),
    Case("an override that matches nothing", nothing, 2, "", "", ["--override", "down_prj=float"]),
    Case("an override that leaves nothing to do", nothing, 2, "", "", ["--override", "*=float"]),
    Case("a device that is not here", nothing, 2, "", "", ["--device", "mps"]),
    Case("less memory than it takes", nothing, 1, "", "", ["--max-memory", "0.2"]),
    # The text is none.
    Case("no such text", nothing, 2, "", "", ["--calib", "gone.txt"]),
    Case("a folder as text", nothing, 2, "", "", ["--calib", "model"]),
    Case("an empty text", written("data.txt", "\n"), 1, "", "", ["--calib", "data.txt"]),
    Case("calibration text that is too short", written("data.txt", "once upon a time " * 3), 1, "", "", ["--calib", "data.txt"], begun=True),
    Case("evaluation text that is too short", written("data.txt", "once upon a time " * 60), 1, "", "", ["--eval", "data.txt"], begun=True),
    Case("a binary as text", written("data.txt", bytes(range(256))), 1, "", "", ["--calib", "data.txt"]),
    Case("jsonl that is not JSON", written("data.jsonl", '{"text": "a"'), 1, "", "", ["--calib", "data.jsonl"]),
    Case("jsonl that turns bad", written("data.jsonl", '{"text": "a"}\n{"text": 1}\n'), 1, "", "", ["--calib", "data.jsonl"], begun=True),
    Case("parquet without a text column", parquet("label", [1, 2]), 1, "", "", ["--calib", "data.parquet"]),
    Case("parquet that is none", written("data.parquet", "PAR"), 1, "", "", ["--calib", "data.parquet"]),
    Case("windows of one token", nothing, 2, "", "", ["--seq-len", "2"], begun=True),
    # The run directory is taken, or none.
    Case("out is a file", written("out", ""), 2, "", ""),
    Case("out lies in a file", nothing, 2, "", "", ["--out", "text.txt/out"]),
    Case("out holds something else", written("out/thesis.txt", "mine"), 2, "", ""),
    Case("out holds a run", interrupted, 2, "", ""),
    Case("resume without a run", nothing, 2, "", "", ["--resume"]),
    Case("resume with another recipe", interrupted, 2, "", "", ["--resume"]),
    Case(
        "resume of a run with a damaged state", both(interrupted, written("out/state.json", '{"done":')), 1, "", "",
        ["--resume", "--scheme", "w8a16"],
    ),
    Case("resume of a run with a damaged recipe", both(interrupted, written("out/recipe.yaml", "model: [")), 2, "", "", ["--resume"]),
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a good model and a good text."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    (folder / "text.txt").write_text("the cat sat on the mat; " * 200, encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_error_and_leaves_no_trace(here: Path, case: Case):
    case.arrange(here)
    before = tree(here)
    ran = run(["run", case.model, *BASE, *case.more], here, env=case.env)
    error, hint = (text.replace("{here}", str(here)) for text in (case.error, case.hint))
    assert (ran.code, ran.out) == (case.code, ""), ran.err
    said = f"error: {error}\n\nhint: {hint}\n"
    assert ran.err[-len(said) :] == said
    shown = ran.err[: -len(said)].splitlines()
    assert bool(shown) == case.begun
    assert [line for line in shown if not PROGRESS.fullmatch(line)] == []
    assert tree(here) == before
