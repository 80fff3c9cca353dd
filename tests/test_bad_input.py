"""Bad input to `qhub run`: one clear error with a hint, the right exit code, nothing on stdout, and no trace on the disk.

Each row of the table is: what is wrong · how it is brought about · exit code · error · hint · further arguments. A run that
had begun (its plan was already shown) is marked; it too leaves nothing behind. `{here}` is the working directory, `…` any
text (mostly another library's).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from forked import deep, needs_plugins, run, start
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

pytestmark = needs_plugins
BASE = (
    "--plugin", "gptq", "--scheme", "w4a16-g32-asym", "--calib", "text.txt", "--eval", "text.txt",
    "--samples", "4", "--seq-len", "32", "--out", "out",
)  # fmt: skip
#: What a run says before it fails: its plan, and how far it came.
PROGRESS = re.compile(r"(model|route|text|size|needs|out): .+|(quantize|export|verify|evaluate|report) .+|warning: .+")
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
    base: Sequence[str] = BASE
    begun: bool = False

    @property
    def arguments(self) -> list[str]:
        """What follows `qhub`."""
        return ["run", *([self.model] if self.model else []), *self.base, *self.more]


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


def recipe(**changes: object) -> Arrange:
    """The recipe of an interrupted run says something else."""

    def arrange(here: Path) -> None:
        interrupted(here)
        path = here / "out" / "recipe.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    return arrange


def both(*steps: Arrange) -> Arrange:
    """One after the other."""
    return lambda here: [step(here) for step in steps]


RESUME = {"model": "", "base": ["--resume", "--out", "out"]}
RECIPE = {"model": "", "base": ["--recipe", "recipe.yaml", "--out", "out"]}
OTHER = {"model": "", "base": ["--recipe", "out/recipe.yaml", "--out", "other"]}
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
CASES = (
    # The model is not one.
    Case("no such model", nothing, 2,
        "unknown model `gone`: no folder and no plugin has that name",
        "a model is a folder with config.json and *.safetensors",
        model="gone"),
    Case("a file instead of a folder", nothing, 2,
        "`model/model.safetensors` is a file; a model is a folder with config.json",
        "give its folder: `model`",
        model="model/model.safetensors"),
    Case("an empty folder", lambda here: (here / "empty").mkdir(), 1,
        "`empty` is not a model folder: it has no config.json",
        "a model folder holds config.json and *.safetensors",
        model="empty"),
    Case("a hub id", nothing, 1,
        "`meta-llama/Llama-3.2-1B` is not a folder here; a model from the hub has to be downloaded first",
        "`hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B`",
        model="meta-llama/Llama-3.2-1B"),
    Case("config that is not JSON", written("model/config.json", "{"), 1,
        "`model/config.json` is not JSON: …",
        "download it again"),
    Case("config that is a list", written("model/config.json", "[]"), 1,
        "`model/config.json` holds `list` where a JSON object is expected",
        "download it again"),
    Case("an architecture that nobody knows", config(model_type="foo9", architectures=["Foo9ForCausalLM"]), 3,
        "this version of transformers does not know the architecture `foo9` of `{here}/model`",
        "`pip install -U transformers` may bring it",
        begun=True),
    Case("no architecture at all", config(model_type=None, architectures=None), 3,
        "no route from `model` to `host`: gptq → hf: `compressed-tensors` folders hold language models; this is `unknown`",
        "`qhub recommend model --explain` shows every rejected route; `qhub plugins` what is installed"),
    Case("a model that is not a language model", config(model_type="bert", architectures=["BertForMaskedLM"]), 3,
        "no route from `model` to `host`: gptq → hf: `compressed-tensors` folders hold language models; this is `nlp`",
        "`qhub recommend model --explain` shows every rejected route; `qhub plugins` what is installed"),
    Case("a config that contradicts itself", config(num_attention_heads=0), 1,
        "transformers cannot read `{here}/model/config.json`: …",
        "check config.json, or get it again",
        begun=True),
    Case("a model with code of its own", config(model_type="own", auto_map={"AutoConfig": "a.B"}), 1,
        "`{here}/model` needs Python code of its own to run, which may do anything",
        "read it; if you trust it, run again with `--trust-remote-code`",
        begun=True),
    Case("a model that is already quantized", config(quantization_config={"quant_method": "gptq"}), 3,
        "`model` is already quantized (`gptq`); quantizing it again would add to its error",
        "start from the float model; `qhub inspect model` says what this one is"),
    Case("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), 1,
        "`model` has no tokenizer",
        "put the model's tokenizer.json beside its weights"),
    Case("a tokenizer that is not one", written("model/tokenizer.json", "{"), 1,
        "`{here}/model` has no usable tokenizer (…)",
        "get the tokenizer's files again",
        begun=True),
    # Its weights are not what they should be.
    Case("pickles only", lambda here: (here / "model" / WEIGHTS).rename(here / "model" / "pytorch_model.bin"), 1,
        "`model/pytorch_model.bin` is a pickle, which can run code when it is opened; qhub reads safetensors only",
        "if you trust it, convert it: python -c …A.from_pretrained('model').save_pretrained('model-safetensors')\""),
    Case("no weights", without(WEIGHTS), 1,
        "`model` has no safetensors files",
        "a model folder holds config.json and *.safetensors"),
    Case("truncated weights", lambda here: os.truncate(here / "model" / WEIGHTS, 100_000), 1,
        "`model/model.safetensors` is not …: tensor `…0.mlp.down_proj.weight` ends at byte `100704` of a file of `100000` (truncated?)",
        "download it again, or check how it was written"),
    Case("weights that are text", written(f"model/{WEIGHTS}", "not found, sorry"), 1,
        "`model/model.safetensors` is not a valid safetensors file: its header claims `7959390400869068654` bytes in a file of `16`",
        "download it again, or check how it was written"),
    Case("a header that lies about a size", header(lambda entries: entries[UP].update(shape=[1000, 1000])), 1,
        "`model/model.safetensors` is not …: tensor `…up_proj.weight` of shape [1000, 1000] F32 needs 4000000 bytes but claims `32768`",
        "download it again, or check how it was written"),
    Case("a header that points outside", header(lambda entries: entries[UP].update(data_offsets=[10**9, 10**9 + 32768])), 1,
        "`model/model.safetensors` is not …: tensor `…1.mlp.up_proj.weight` ends at byte `1000035100` of a file of `364060` (truncated?)",
        "download it again, or check how it was written"),
    Case("a missing shard", index({UP: "model-00002-of-00002.safetensors"}), 1,
        "`model/model-00002-of-00002.safetensors` does not exist",
        "download the missing shard again"),
    Case("an index that names a tensor that is not there", index({"model.layers.9.up.weight": WEIGHTS}), 1,
        "`model/model.safetensors.index.json` says that `model.safetensors` holds `model.layers.9.up.weight`, which it does not",
        "download the model again"),
    Case("an index that leads out of the folder", index({UP: "../text.txt"}), 1,
        "`model/model.safetensors.index.json` names a file outside its folder",
        "do not use this model"),
    Case("NaN in the last block", put(UP, 77, float("nan")), 1,
        "tensor `model.layers.1.mlp.up_proj.weight` contains NaN or infinite numbers",
        "the file is damaged or the training diverged: get the weights again",
        begun=True),
    Case("infinity in the final norm", put("model.norm.weight", 3, float("inf")), 1,
        "tensor `model.norm.weight` contains NaN or infinite numbers",
        "the file is damaged or the training diverged: get the weights again",
        begun=True),
    Case("shapes that the config does not say", config(intermediate_size=96), 1,
        "tensor `model.layers.0.mlp.gate_proj.weight` has shape [128, 64]; the config asks for [96, 64]",
        "check that config.json belongs to these weights",
        begun=True),
    Case("a vocabulary that the config does not say", config(vocab_size=1000), 1,
        "`model/config.json` says vocabulary and width `(1000, 64)`, but `model.embed_tokens.weight` has shape `(128, 64)`",
        "download the config that belongs to these weights"),
    Case("a block too few", config(num_hidden_layers=3), 1,
        "`model/config.json` says `3` blocks, but block `2` has no weights",
        "download the missing shard, or the config that belongs to these weights"),
    Case("a tensor too few", tensors(lambda found: found.pop(UP)), 1,
        "`{here}/model` has no tensor `model.layers.1.mlp.up_proj.weight`, which `LlamaForCausalLM` needs",
        "check that config.json belongs to these weights",
        begun=True),
    # What was asked for does not exist, or does not go together.
    Case("an unknown target", nothing, 2,
        "unknown target `raspberry-pi`",
        "did you mean `raspberry-pi-5`? `qhub targets` lists them all",
        ["--target", "raspberry-pi"]),
    Case("an unknown scheme", nothing, 2,
        "unknown scheme `int4`",
        "write it like `w4a16-g128-asym`, `w8a16`, `w8a8-static`, `fp16` or `nf4`",
        ["--scheme", "int4"]),
    Case("a scheme that the method does not write", nothing, 3,
        "no route from `model` to `host`: gptq → hf → hf: `gptq` does not write scheme `w8a8-static`",
        "`qhub recommend model --explain` shows every rejected route; `qhub plugins` what is installed",
        ["--scheme", "w8a8-static"]),
    Case("an unknown plugin", nothing, 2,
        "unknown plugin `int3magic`",
        "known: awq, gptq, hf, hf-awq, hf-gptq, hf-gptq-v2, rtn (a plugin may bring it: `pip install qhub-int3magic`)",
        ["--plugin", "int3magic"]),
    Case("a plugin that is planned", nothing, 2,
        "plugin `mlx` is planned and not published yet",
        "`qhub plugins` lists the installed ones",
        ["--plugin", "mlx"]),
    Case("two quantizers that both round", nothing, 2,
        "quantizers `gptq`, `rtn` do not work together: each of them rounds",
        "keep one: `--plugin gptq`",
        ["--plugin", "rtn"]),
    Case("three quantizers", nothing, 2,
        "quantizers `gptq`, `rtn` do not work together: each of them rounds",
        "keep one: `--plugin gptq`",
        ["--plugin", "awq", "--plugin", "rtn"]),
    Case("a group size that divides nothing", nothing, 3,
        "group size `256` divides no layer of `model` (inputs: 128, 64), e.g. `model.layers.0.mlp.down_proj.weight`",
        "try `--scheme w4a16-g128-asym`",
        ["--scheme", "w4a16-g256-asym"]),
    Case("an override without a scheme", nothing, 2,
        "`--override down_proj` is not PATTERN=SCHEME",
        "write it like `--override 'down_proj=float'`",
        ["--override", "down_proj"]),
    Case("an override with an unknown scheme", nothing, 2,
        "unknown scheme `w9`",
        "write it like `w4a16-g128-asym`, `w8a16`, `w8a8-static`, `fp16` or `nf4`",
        ["--override", "down_proj=w9"]),
    Case("an override that the method does not write", nothing, 2,
        "override `down_proj=fp16`: `gptq` does not write scheme `fp16`",
        "to keep layers as they are: `down_proj=float`",
        ["--override", "down_proj=fp16"]),
    Case("an override that the file format does not have", nothing, 2,
        "override `down_proj=w8a16`: `awq` has 4 bits; it does not carry scheme `w8a16`",
        "to keep layers as they are: `down_proj=float`",
        ["--plugin", "hf-awq", "--override", "down_proj=w8a16"]),
    Case("a scheme that the file format does not have", nothing, 3,
        "no route from `model` to `host`: gptq → hf-awq: `awq` has 4 bits; it does not carry scheme `w3a16-g32-asym`",
        "`qhub recommend model --explain` shows every rejected route; `qhub plugins` what is installed",
        ["--plugin", "hf-awq", "--scheme", "w3a16-g32-asym"]),
    Case("an override that matches nothing", nothing, 2,
        "override `down_prj=float` matches no layer of `model`",
        "a pattern is the end of a layer's name, or has `*`; e.g. `down_proj`",
        ["--override", "down_prj=float"]),
    Case("an override that leaves nothing to do", nothing, 2,
        "every layer of `model` is to stay float: nothing is left to quantize",
        "leave out an `--override`",
        ["--override", "*=float"]),
    Case("a device that is not here", nothing, 2,
        "device `cuda` is not available here",
        "use `--device cpu`",
        ["--device", ABSENT]),
    Case("less memory than it takes", nothing, 1,
        "quantizing `model` needs about `…` GB of memory, more than the bound of 0.20 GB",
        "`--max-memory …` or more",
        ["--max-memory", "0.2"]),
    # The text is none.
    Case("no such text", nothing, 2,
        "data file `gone.txt` does not exist",
        "give a text (.txt, .jsonl or .parquet)",
        ["--calib", "gone.txt"]),
    Case("a folder as text", nothing, 2,
        "data file `model` is a folder, not a text",
        "give a text (.txt, .jsonl or .parquet)",
        ["--calib", "model"]),
    Case("an empty text", written("data.txt", "\n"), 1,
        "`{here}/data.txt` holds no text",
        "give a file with text",
        ["--calib", "data.txt"]),
    Case("calibration text that is too short", written("data.txt", "once upon a time " * 3), 1,
        "`{here}/data.txt` gives `51` tokens; 4 samples of 32 need 124",
        "give about 3 times as much text, or use `--samples 1`",
        ["--calib", "data.txt"], begun=True),
    Case("evaluation text that is too short", written("data.txt", "once upon a time " * 60), 1,
        "`{here}/data.txt` gives `1020` tokens; 60 samples of 32 need 1860",
        "give about 2 times as much text, or use `--seq-len 18`",
        ["--eval", "data.txt"], begun=True),
    Case("a binary as text", written("data.txt", bytes(range(256))), 1,
        "`{here}/data.txt` is not UTF-8 text (invalid start byte at byte 128)",
        "convert it to UTF-8",
        ["--calib", "data.txt"]),
    Case("jsonl that is not JSON", written("data.jsonl", '{"text": "a"'), 1,
        "line 1 of `{here}/data.jsonl` is not JSON",
        "every line of a .jsonl file is one JSON value",
        ["--calib", "data.jsonl"]),
    Case("jsonl that turns bad", written("data.jsonl", '{"text": "a"}\n{"text": 1}\n'), 1,
        "line 2 of `{here}/data.jsonl` has no text",
        "each row needs a string field named text, content, prompt",
        ["--calib", "data.jsonl"], begun=True),
    Case("parquet without a text column", parquet("label", [1, 2]), 1,
        "`{here}/data.parquet` has no text column",
        "name a string column text, content, prompt",
        ["--calib", "data.parquet"]),
    Case("parquet that is none", written("data.parquet", "PAR"), 1,
        "`{here}/data.parquet` is not a parquet file (…)",
        "check how it was written",
        ["--calib", "data.parquet"]),
    # The run directory is taken, or none.
    Case("out is a file", written("out", ""), 2,
        "invalid value for `--out`: directory `out` is a file",
        "see `qhub run --help`"),
    Case("out lies in a file", nothing, 2,
        "`{here}/text.txt` is a file, not a directory",
        "give another directory: `--out DIR`",
        ["--out", "text.txt/out"]),
    Case("out holds something else", written("out/thesis.txt", "mine"), 2,
        "`out` is not empty and not a run",
        "give a new directory: `--out DIR`"),
    Case("out holds a run", interrupted, 2,
        "`out` already holds a run",
        "continue it: `qhub run --resume --out out`, or give a new directory: `--out DIR`"),
    Case("resume without a run or a name", nothing, 2,
        "`runs/` has no unfinished run of this recipe for `model`",
        "name its directory: `qhub run --resume --out DIR`; leave out `--resume` to start a run",
        base=BASE[:-2], more=["--resume"]),
    Case("resume without a run", nothing, 2,
        "`out` has no recipe.yaml: there is nothing to resume",
        "leave out `--resume` to start a run",
        ["--resume"]),
    Case("resume with another recipe", interrupted, 2,
        "`out` holds a run of another recipe",
        "leave out MODEL and options: `qhub run --resume --out out`",
        ["--resume"]),
    Case("resume of a run with a damaged state", both(interrupted, written("out/state.json", '{"done":')), 1,
        "`out/state.json` is damaged",
        "`rm out/state.json`, then `qhub run --resume --out out`: finished blocks are kept",
        ["--resume", "--scheme", "w8a16"]),
    Case("resume of a run with a damaged recipe", both(interrupted, written("out/recipe.yaml", "model: [")), 1,
        "`out/recipe.yaml` is damaged",
        "`rm -r out`, then start again",
        ["--resume"]),
    Case("resume of that without its options", both(interrupted, written("out/recipe.yaml", "model: [")), 2,
        "`out/recipe.yaml`: the recipe is not YAML: …",
        "every run directory holds one to start from: recipe.yaml",
        **RESUME),
    Case("resume with another option", interrupted, 2,
        "the run in `out` already says what `--seed` would change",
        "`qhub run --resume --out out`",
        model="", base=["--resume", "--out", "out", "--seed", "1"]),
    Case("resume of a model that changed", both(interrupted, put(UP, 3, 0.5)), 1,
        "the model at `{here}/model` is not the one that `out/recipe.yaml` was written for (its sha256 differs)",
        "get the same files again, or start a new run: `qhub run {here}/model`",
        **RESUME),
    Case("resume of a model that is gone", both(interrupted, lambda here: (here / "model").rename(here / "moved")), 1,
        "the model of `out/recipe.yaml` is no longer at `{here}/model`",
        "say where it is: `qhub run MODEL --recipe out/recipe.yaml --resume`",
        **RESUME),
    Case("resume with another text", both(interrupted, written("text.txt", "the dog " * 999)), 1,
        "`{here}/text.txt` is not the text that the recipe was written for (its sha256 differs)",
        "get the same file again, or start a new run",
        **RESUME),
    Case("resume without the text", both(interrupted, lambda here: (here / "text.txt").unlink()), 2,
        "data file `{here}/text.txt` does not exist",
        "say where it is: `--calib TEXT`",
        **RESUME),
    # The recipe is none.
    Case("a recipe that is not YAML", written("recipe.yaml", "model: ["), 2,
        "`recipe.yaml`: the recipe is not YAML: …",
        "every run directory holds one to start from: recipe.yaml",
        **RECIPE),
    Case("a recipe that is not text", written("recipe.yaml", b"\xff\xfe"), 2,
        "`recipe.yaml` is not a recipe: it is not text",
        "give the recipe.yaml of a run",
        **RECIPE),
    Case("a recipe that lacks a key", written("recipe.yaml", "model: m"), 2,
        "`recipe.yaml`: the recipe has no `model_path`",
        "every run directory holds a complete one: recipe.yaml",
        **RECIPE),
    Case("a recipe with an unknown key", recipe(colour="red"), 2,
        "`out/recipe.yaml`: `recipe` has the unknown key `colour`",
        "known: model, model_path, …, versions, hardware, preprocess",
        **OTHER),
    Case("a recipe with a bad value", recipe(seed="many"), 2,
        "`out/recipe.yaml`: `recipe.seed` is `many`, which is not a number from 0 up",
        "write a number from 0 up there",
        **OTHER),
    Case("a recipe with an unknown option", recipe(options={"gptq": {"speed": 9}}), 2,
        "quantizer `gptq` has no option `speed`",
        "its options are: damping, compensate, refits",
        **OTHER),
    Case("a recipe with options for nobody", recipe(options={"awq": {}}), 2,
        "the recipe has options for `awq`, which its method `gptq` does not use",
        "leave them out, or change the method: `gptq+awq`",
        **OTHER),
    Case("a recipe with an unknown method", recipe(method="int3magic"), 2,
        "unknown plugin `int3magic`",
        "known: awq, gptq, hf, hf-awq, hf-gptq, hf-gptq-v2, rtn (a plugin may bring it: `pip install qhub-int3magic`)",
        **OTHER),
    Case("a recipe and another option", written("recipe.yaml", ""), 2,
        "`recipe.yaml` already says what `--scheme` would change",
        "leave out `--recipe` to start from options",
        model="", base=[*RECIPE["base"], "--scheme", "w8a16"]),
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
    ran = run(case.arguments, here)
    assert (ran.code, ran.out) == (case.code, ""), ran.err
    shown, _, said = ran.err.rpartition("error: ")
    expected = re.escape(f"{case.error}\n\nhint: {case.hint}\n").replace("…", ".+").replace(re.escape("{here}"), re.escape(str(here)))
    assert re.fullmatch(expected, said), said
    assert bool(shown) == case.begun
    assert [line for line in shown.splitlines() if not PROGRESS.fullmatch(line)] == []
    assert tree(here) == before


def test_there_are_many_kinds_of_bad_input():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


# What depends on the machine, or on another process.


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """A disk of 3 MB at `here / "disk"`."""
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_too_small_is_refused_before_work_begins(here: Path, small_disk: Path):
    (small_disk / "ballast").write_bytes(bytes(2_900_000))
    ran = run(["run", "model", *BASE, "--out", "disk/out"], here)
    numbers = re.sub(r"\d+ kB", "N kB", ran.err)
    error = f"error: `{small_disk}` has `N kB` free; the run needs about N kB"
    assert numbers == f"{error}\n\nhint: free some space, or give a directory on another disk: `--out DIR`\n"
    assert (ran.code, ran.out, [path.name for path in small_disk.iterdir()]) == (1, "", ["ballast"])


def test_a_disk_that_fills_up_while_a_run_works_is_one_error_and_the_run_goes_on_later(here: Path, small_disk: Path):
    model = deep(here / "model")
    work = start(["run", model.name, *BASE, "--out", "disk/out"], here)

    def full() -> bool:
        if not (small_disk / "out" / "work" / "block-00001.json").exists():
            return False
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        return True

    ran = work.send(signal.SIGCONT, full)
    error = r"error: no space left on the device( for `.+`)?\n\nhint: free some space, then `qhub run --resume --out disk/out`\n"
    assert (ran.code, ran.out) == (1, "")
    assert re.search(error + r"\Z", ran.err), ran.err
    (small_disk / "ballast").unlink()
    assert run(["run", "--resume", "--out", "disk/out"], here).code in (0, 5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(here: Path):
    (here / "shut").mkdir(mode=0o500)
    ran = run(["run", "model", *BASE, "--out", "shut/out"], here)
    assert ran == (1, "", f"error: `{here}/shut` is not writable\n\nhint: give another directory: `--out DIR`\n")


def test_a_run_that_another_process_works_on_is_left_alone(here: Path):
    ran = run(["run", "model", *BASE], here, die_at="block-00000.json")
    assert ran.code == -9
    before = tree(here)
    holder = os.open(here / "out", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    ran = run(["run", "--resume", "--out", "out"], here)
    os.close(holder)
    error = "error: `out` is in use: another process is working on this run"
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(f"{error}\n\nhint: wait until it ends, or give another directory: `--out DIR`\n")
    assert tree(here) == before
