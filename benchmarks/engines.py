"""The engines that the speed benchmarks compare: how each is started, and what it prints.

An engine runs in a process of its own, once per call: load, warm up, prompts, generation, end. Imports only the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Load:
    """What an engine is to do; lengths in tokens. `prompts` and `generate` are measured apart."""

    threads: int
    prompts: tuple[int, ...]
    generate: int


@dataclass(frozen=True)
class Speed:
    """What it did. `prompt` is tokens/s by length; `bandwidth_share` is how much of what memory gives the weights take while it
    generates, None where the engine does not tell.

    `others` is what else ran meanwhile: processor time of other processes (and what the hypervisor took) per second.
    """

    prompt: dict[int, float]
    generate: float
    peak_rss_bytes: int
    load_s: float | None = None
    bandwidth_share: float | None = None
    others: float = 0.0


@dataclass(frozen=True)
class Ended:
    """A process that ran to its end."""

    stdout: str
    peak_rss_bytes: int
    others: float


@dataclass(frozen=True)
class Engine:
    """A name for the table, the command for a load, and the reader of its stdout."""

    name: str
    command: Callable[[Load], list[str]]
    read: Callable[[Ended], Speed]

    def measure(self, load: Load) -> Speed:
        """Run it once.

        :raises RuntimeError: when it fails, with the end of what it said.
        """
        ended = run(self.command(load))
        return replace(self.read(ended), others=ended.others)


def run(command: list[str]) -> Ended:
    """Run a command to its end, alone among ours.

    :raises RuntimeError: when it fails, with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start, busy = time.perf_counter(), _busy_seconds()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds, foreign = time.perf_counter() - start, _busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed with {process.returncode}: {err.read()[-2000:]}")
        return Ended(out.read(), usage.ru_maxrss * 1024, max(foreign, 0.0) / seconds)


def qhub(folder: Path, *options: str) -> Engine:
    """This project's native runtime on a QuantizedModel folder; `options` are more of `qhub bench`'s."""

    def command(load: Load) -> list[str]:
        lengths = [word for length in load.prompts for word in ("--prompt", str(length))]
        words = [sys.executable, "-m", "qhub", "bench", str(folder), "--json", "--runtime", "native", "--rounds", "1"]
        return [*words, "--threads", str(load.threads), *lengths, "--generate", str(load.generate), *options]

    return Engine(" ".join(("qhub", folder.parent.name, *options)), command, _read_qhub)


def llama_bench(executable: Path, model: Path) -> Engine:
    """One build of llama.cpp on one GGUF file. Its generation starts from an empty context."""

    def command(load: Load) -> list[str]:
        lengths = ",".join(map(str, load.prompts)) or "0"
        words = [str(executable), "-m", str(model), "-t", str(load.threads), "-r", "1", "-o", "json"]
        return [*words, "-p", lengths, "-n", str(load.generate)]

    return Engine(f"llama.cpp {executable.parent.parent.name} {model.stem}", command, _read_llama_bench)


def runner(python: Path, script: str, model: Path) -> Engine:
    """A peer that has a runner in `peers/`, in the environment of that Python."""

    def command(load: Load) -> list[str]:
        lengths = ["--prompt", *map(str, load.prompts)] if load.prompts else []
        return [str(python), str(PEERS / script), str(model), "--threads", str(load.threads), *lengths, "--generate", str(load.generate)]

    return Engine(f"{script.removesuffix('_run.py')} {model.stem}", command, _read_figures)


def present(candidates: Sequence[tuple[Engine, Sequence[Path]]]) -> list[Engine]:
    """The engines all of whose files exist; the others are named on stderr with what is missing."""
    found = []
    for engine, files in candidates:
        missing = [str(path) for path in files if not path.exists()]
        if missing:
            print(f"{engine.name} is not run: no `{missing[0]}`", file=sys.stderr)
        else:
            found.append(engine)
    return found


def _busy_seconds() -> float:
    """Processor time of the whole machine so far, all but idle and waiting; 0 where there is no `/proc/stat`."""
    try:
        user, nice, system, _, _, *interrupts_and_steal = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, *interrupts_and_steal))) / os.sysconf("SC_CLK_TCK")


def _read_qhub(ended: Ended) -> Speed:
    figures = json.loads(ended.stdout)["runs"][0]
    prompt = {row["tokens"]: row["tokens_per_s"] for row in figures["prompt"]}
    share = figures["bandwidth_share"]
    return Speed(prompt, figures["generate_tokens_per_s"], figures["peak_rss_bytes"], figures["load_s"], share)


def _read_figures(ended: Ended) -> Speed:
    figures = json.loads(ended.stdout.strip().splitlines()[-1])
    prompt = {int(length): float(speeds[0]) for length, speeds in figures["prompt_tokens_per_s"].items()}
    generate = figures["generate_tokens_per_s"][0]
    return Speed(prompt, generate, figures["peak_rss_bytes"], figures["load_s"])


def _read_llama_bench(ended: Ended) -> Speed:
    rows = json.loads(ended.stdout)
    prompt = {row["n_prompt"]: row["avg_ts"] for row in rows if row["n_prompt"]}
    return Speed(prompt, next((row["avg_ts"] for row in rows if row["n_gen"]), 0.0), ended.peak_rss_bytes)
