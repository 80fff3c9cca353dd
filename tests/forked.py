"""The real `qhub` command in processes of its own that start at once: forked from one that already holds torch and transformers.

`run` waits for the end; `start` returns a process to watch, interrupt or kill. `die_at` kills it with -9 just before a file or
folder of that name appears under its final name (Python tells a process of its own renames), `nth` when that happens again.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

PLUGINS = ("rtn", "awq", "gptq", "hf")
PRELOADED = (
    "torch",
    "accelerate",
    "compressed_tensors",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.auto",
    "qhub.pipeline",
    "qhub.quantize.walk",
    "qhub.prove.assemble",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(PRELOADED))

needs_plugins = pytest.mark.skipif(
    not {f"qhub-{name}" for name in PLUGINS} <= {distribution.name for distribution in metadata.distributions()},
    reason="needs the plugins (make test installs them)",
)


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass
class Started:
    """A command that may still be at work."""

    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    def wait(self, timeout_s: float = 120) -> Ran:
        """Wait for its end; a killed one has the code -9."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f"still at work after {timeout_s} s: {self.err.read_text()}")
        ran = Ran(self.process.exitcode, self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8"))
        self.process.close()
        return ran

    def send(self, number: signal.Signals, when: Callable[[], bool], timeout_s: float = 120) -> Ran:
        """Wait until `when()` is true, send a signal, and wait for the end."""
        end = time.monotonic() + timeout_s
        while self.process.is_alive() and not when():
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.002)
        assert self.process.is_alive(), f"it ended before the moment came: {self.err.read_text()}"
        os.kill(self.process.pid, number)
        return self.wait()


def deep(model: Path, blocks: int = 6) -> Path:
    """A copy of a tiny Llama that has its first block `blocks` times: there is time to watch a run of it."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, model.with_name("deep"))
    found = load_file(folder / "model.safetensors")
    first = {name: tensor for name, tensor in found.items() if name.startswith("model.layers.0.")}
    for index in range(blocks):
        found |= {name.replace(".0.", f".{index}.", 1): tensor.clone() for name, tensor in first.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(
    arguments: Sequence[object],
    folder: Path,
    *,
    env: dict[str, str] | None = None,
    die_at: str | None = None,
    nth: int = 1,
    terminal: Path | None = None,
) -> Started:
    """Start `qhub …` in `folder` with qhub's own plugins; `env` adds to the environment. Without a terminal, it writes to files."""
    variables = {"QHUB_PLUGINS": ",".join(PLUGINS), **(env or {})}
    streams = [terminal or folder.parent / f"{folder.name}-{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
    process = _CONTEXT.Process(target=_qhub, args=([*map(str, arguments)], folder, variables, streams, _Death(die_at, nth)))
    process.start()
    return Started(process, *streams)


def run(arguments: Sequence[object], folder: Path, *, env: dict[str, str] | None = None, die_at: str | None = None, nth: int = 1) -> Ran:
    """What `qhub …` in `folder` did."""
    return start(arguments, folder, env=env, die_at=die_at, nth=nth).wait()


@dataclass
class _Death:
    name: str | None
    left: int

    def __call__(self, event: str, details: Sequence[object]) -> None:
        if event == "os.rename" and self.name is not None and fnmatch.fnmatchcase(str(details[1]), f"*/{self.name}"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _qhub(arguments: list[str], folder: Path, variables: dict[str, str], streams: list[Path], death: _Death) -> None:
    for path, number in zip(streams, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.update(variables)
    sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep)
    if death.name is not None:
        sys.addaudithook(death)
    import torch

    from qhub.cli import main

    torch.set_num_threads(1)  # the models are tiny, and the tests share the machine
    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)


def terminal_output(main: int) -> Iterator[bytes]:
    """What is written to the other side of the pseudo-terminal `main` until that is closed."""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # Linux says so when the other side is closed
            return
        if not data:
            return
        yield data
