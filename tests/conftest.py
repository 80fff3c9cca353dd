"""What the tests share: the real `qhub` command in a process of its own, and real plugins written to a folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
os.environ["QHUB_NO_HISTORY"] = "1"  # what tests took is no news to the user's machine


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def qhub(tmp_path: Path) -> Callable[..., Ran]:
    """Run `qhub …` in `tmp_path` without plugins; `env` adds to the environment."""

    def run(*arguments: object, env: dict[str, str] | None = None, command: tuple[str, ...] = ("-m", "qhub")) -> Ran:
        variables = {**os.environ, "QHUB_PLUGINS": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", **(env or {})}
        result = subprocess.run(
            [sys.executable, *command, *map(str, arguments)], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        return Ran(result.returncode, result.stdout, result.stderr)

    return run


@pytest.fixture
def toy_plugin(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Install a plugin of one module: write it and its metadata, and return the environment in which `qhub` finds it."""
    folder = tmp_path / "toy-plugins"
    names: list[str] = []

    def install(name: str, source: str) -> dict[str, str]:
        names.append(name)
        metadata = folder / f"qhub_{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"qhub_toy_{name}.py").write_text(source, encoding="utf-8")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qhub-{name}\nVersion: 1.0\n", encoding="utf-8")
        (metadata / "entry_points.txt").write_text(f"[qhub]\n{name} = qhub_toy_{name}\n", encoding="utf-8")
        return {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "QHUB_PLUGINS": ",".join(names)}

    return install


DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder from a config and name → shape (or (dtype, shape)); the weights are holes, so any size is free."""

    def write(config: object, shapes: dict[str, tuple], *, name: str = "model", files: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        header, offset = {}, 0
        for key, entry in shapes.items():
            dtype, shape = entry if entry and isinstance(entry[0], str) else ("BF16", entry)
            end = offset + DTYPE_BYTES[dtype] * math.prod(shape)
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        if shapes:
            text = json.dumps(header).encode()
            with (folder / "model.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + offset)
        for extra in files:
            (folder / extra).write_text("{}", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def llama(model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Write a folder in the shape of a Llama; `config` adds to or replaces what its config says."""

    def write(
        *, hidden: int = 64, ffn: int = 128, blocks: int = 2, vocab: int = 256, tied: bool = True, name: str = "llama", **config
    ) -> Path:
        kv = hidden // 2
        shapes: dict[str, tuple] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        if not tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        for index in range(blocks):
            block = f"model.layers.{index}"
            shapes |= {f"{block}.self_attn.{key}_proj.weight": (kv if key in "kv" else hidden, hidden) for key in "qkvo"}
            shapes |= {f"{block}.mlp.{key}_proj.weight": (ffn, hidden) for key in ("gate", "up")}
            shapes |= {f"{block}.mlp.down_proj.weight": (hidden, ffn), f"{block}.input_layernorm.weight": (hidden,)}
            shapes |= {f"{block}.post_attention_layernorm.weight": (hidden,)}
        facts = {
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": blocks,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
        }  # fmt: skip
        return model_folder(facts | config, shapes, name=name, files=("tokenizer.json",))

    return write
