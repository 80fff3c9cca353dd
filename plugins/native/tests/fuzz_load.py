"""Opens damaged copies of a model until time is up: only a QhubError, or a model that runs, is an answer.

    python plugins/native/tests/fuzz_load.py --seconds 600 [--seed N]

Damage: files cut short, bytes changed, JSON values replaced, in config.json, qhub.json, the safetensors headers and the pack cache.
With a binding built by `cmake -DQHUB_SANITIZE=ON` and `LD_PRELOAD=$(gcc -print-file-name=libasan.so)` memory errors end it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qhub_native import _native
from qhub_native.load import Options
from qhub_native.session import NativeSession

from qhub import QhubError

VALUES = (
    0,
    -1,
    1,
    2,
    3,
    7,
    16,
    31,
    2**31,
    2**40,
    -(2**63),
    1e308,
    float("nan"),
    0.5,
    True,
    None,
    "",
    "x",
    "BF16",
    "I64",
    [],
    {},
    [0, 8],
    [-1, 4],
)


def model(folder: Path, draw: random.Random) -> Path:
    """A Llama of random numbers, 2 blocks, as a QuantizedModel, written without torch."""
    hidden, heads, ffn, vocabulary = 32, 2, 64, 40
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "intermediate_size": ffn, "vocab_size": vocabulary, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False, "eos_token_id": 2,
    }  # fmt: skip
    layers, tensors = {}, {}
    rng = np.random.default_rng(draw.randrange(2**32))
    for block in range(2):
        at = f"model.layers.{block}"
        shapes = {"q": (hidden, hidden), "k": (16, hidden), "v": (16, hidden), "o": (hidden, hidden)}
        named = {f"{at}.self_attn.{name}_proj": shape for name, shape in shapes.items()}
        named |= {f"{at}.mlp.gate_proj": (ffn, hidden), f"{at}.mlp.up_proj": (ffn, hidden), f"{at}.mlp.down_proj": (hidden, ffn)}
        for name, (rows, inputs) in named.items():
            layers[name] = "w4a16-g32-asym"
            tensors[f"{name}.weight_packed"] = rng.integers(-(2**31), 2**31, (rows, inputs // 8), dtype=np.int64).astype("<i4")
            tensors[f"{name}.weight_scale"] = rng.random((rows, inputs // 32)).astype("<f2")
            tensors[f"{name}.weight_shape"] = np.array([rows, inputs], dtype="<i8")
            tensors[f"{name}.weight_zero_point"] = rng.integers(0, 2**31, (rows // 8, inputs // 32)).astype("<i4")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = np.ones(hidden, dtype="<f4")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = rng.standard_normal((vocabulary, hidden)).astype("<f2")
    tensors["model.norm.weight"] = np.ones(hidden, dtype="<f4")
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qhub.json").write_text(json.dumps({"format_version": 1, "kind": "weights", "scheme": "w4a16-g32-asym", "layers": layers}))
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format in ten lines, so that the header can be damaged at will."""
    names = {"<f4": "F32", "<f2": "F16", "<i4": "I32", "<i8": "I64"}
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype.str], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(min(len(changed), 6000))] = draw.randrange(256)
    return bytes(changed)


def reword(data: bytes, draw: random.Random) -> bytes:
    """One or more values of the JSON replaced; in a safetensors file, of its header."""
    if data[:1] == b"{":
        return json.dumps(replaced(json.loads(data), draw)).encode()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(replaced(json.loads(data[8 : 8 + length]), draw)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def replaced(value: Any, draw: random.Random) -> Any:
    spots = list(places(value))
    for holder, key in draw.sample(spots, min(len(spots), draw.choice((1, 1, 1, 3)))):
        old = holder[key]
        near = [old + 1, old - 1, old * 2, old // 2] if isinstance(old, int) else []
        holder[key] = draw.choice([*VALUES, *near, *near])
        if draw.random() < 0.1 and isinstance(holder, dict):
            del holder[key]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, reword, reword, reword)


def attempt(folder: Path, draw: random.Random) -> str:
    """Damage one file, open the model and run a step: "ran" or the error's first words."""
    files = [
        folder / "config.json",
        folder / "qhub.json",
        folder / "model.safetensors",
        *Path(os.environ["QHUB_NATIVE_CACHE"]).glob("*.pack"),
    ]
    path = draw.choice(files)
    data = path.read_bytes()
    damage = draw.choice(DAMAGE if path.suffix != ".pack" else (cut, flip))
    stat = path.stat()
    path.write_bytes(damage(data, draw))
    if path.suffix != ".pack" or draw.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        opened = NativeSession(folder, Options(1, _native.kernel_names()[-1], exact=draw.random() < 0.5, forced=True))
        if opened.config.context < 1 << 20:
            opened.feed(opened.sequence(8), [1, 2, 3])
        return "ran"
    except QhubError as error:
        return " ".join(error.message.split()[1:5])
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fuzz(seconds: float, seed: int) -> dict[str, int]:
    """How often each answer came."""
    draw, answers = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        os.environ["QHUB_NATIVE_CACHE"] = f"{name}/cache"
        model(folder, draw)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = attempt(folder, draw)
            answers[answer] = answers.get(answer, 0) + 1
            if sum(answers.values()) % 200 == 0:
                shutil.rmtree(f"{name}/cache", ignore_errors=True)
    return answers


def main() -> None:
    """Print how often each answer came; any other exception is a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    answers = fuzz(options.seconds, options.seed)
    for answer, count in sorted(answers.items(), key=lambda item: -item[1]):
        print(f"{count:8}  {answer}")
    print(f"{sum(answers.values()):8}  in all, no crash")


if __name__ == "__main__":
    main()
