"""What the peers' runners share: arguments, stopwatch, the result line, the plain float folder.

Imports no quantization tool: each runner lives in that tool's own environment.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MODEL_DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One quantization to run, as given on the command line."""

    model: Path
    tokens: Path
    out: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    ignore: tuple[str, ...]
    dtype: str
    variant: str
    dequantized: Path | None

    def samples(self) -> torch.Tensor:
        """The calibration tokens, (samples, length) int64."""
        return torch.from_numpy(np.load(self.tokens))

    @property
    def scheme(self) -> str:
        """The scheme string, for instance `w4a16-g128-asym`."""
        return f"w{self.bits}a16-g{self.group_size}-{'sym' if self.symmetric else 'asym'}"


@dataclass
class Result:
    """What is measured: wall time per stage, peak memory, and whatever the runner adds."""

    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def note_peak_rss(self) -> None:
        """Take this process's peak resident memory so far; called before anything that is not quantizing."""
        self.facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_job(description: str, methods: list[str], variants: list[str]) -> Job:
    """The command line of a runner. `variants` are the tool's settings beside its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of a float model")
    parser.add_argument("tokens", type=Path, help=".npy of tokens.py: int64 (samples, length)")
    parser.add_argument("out", type=Path, help="folder for the tool's own result; replaced if it exists")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--ignore", nargs="*", default=(), help="part of a layer's name, e.g. down_proj: left float")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default="auto", help="to load the model in")
    parser.add_argument("--variant", choices=["default", *variants], default="default")
    parser.add_argument("--dequantized", type=Path, help="also write a plain float32 folder here")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    args = vars(parser.parse_args())
    threads = args.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return Job(**{**args, "ignore": tuple(args["ignore"])})


def result_stream() -> TextIO:
    """The real stdout, for the result line; from here on whatever is printed goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def print_result(stream: TextIO, tool: tuple[str, str], job: Job, result: Result) -> None:
    """The one JSON line. tool is (name, version)."""
    row = {
        "tool": tool[0],
        "version": tool[1],
        "method": job.method,
        "variant": job.variant,
        "scheme": job.scheme,
        "ignored": list(job.ignore),
        "dtype": job.dtype,
        "threads": torch.get_num_threads(),
        "seconds": result.seconds["quantize"],
        "load_seconds": result.seconds["load"],
        "save_seconds": result.seconds["save"],
        **result.facts,
    }
    print(json.dumps(row), file=stream, flush=True)


def empty_folder(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def write_float_folder(original: Path, tensors: dict[str, torch.Tensor], out: Path) -> None:
    """A plain float32 model: config and tokenizer of `original`, weights from `tensors` (any float type)."""
    empty_folder(out)
    for path in original.iterdir():
        if path.suffix in {".json", ".model"} and "index" not in path.name:
            shutil.copyfile(path, out / path.name)
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")
    whole = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def largest_difference(own: torch.nn.Module, dequantized: torch.nn.Module, sample: torch.Tensor) -> dict[str, float]:
    """How far the logits of the tool's model are from those of our float32 folder, on one sample (length,)."""
    logits = own(input_ids=sample[None]).logits.float()
    expected = dequantized(input_ids=sample[None]).logits.float()
    difference = (logits - expected).abs()
    return {"max_logit_difference": difference.max().item(), "logit_deviation": expected.std().item()}
