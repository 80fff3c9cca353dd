"""Seconds and peak memory of quantizing one model, qhub and its peers in turn on the same tokens.

    python benchmarks/speed.py MODEL --methods rtn gptq awq --llmcompressor LLMC/bin/python --gptqmodel GPTQM/bin/python

MODEL is a folder of `make_llama.py` (its calibration.txt is used, 64 × 512 tokens). Each figure is of a whole process: start,
imports, loading, quantizing, saving the packed model; evaluation is no part of it. The tools take turns, `--rounds` times.
The peers' environments are described in `benchmarks/peers/README.md`; leave one out and it is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SCHEME = "w4a16-g128-asym"
SAMPLES, LENGTH = 64, 512


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command to its end: (wall seconds, peak resident bytes of the process).

    :raises RuntimeError: when it fails, with the end of what it said.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def planned(model: Path, method: str, out: Path) -> Path:
    """The folder of a planned run that has not begun."""
    from qhub import pipeline
    from qhub.plugins import Plugins
    from qhub.route.recipe import to_yaml
    from qhub.rundir import RunDir

    text = str(model / "calibration.txt")
    request = pipeline.RunRequest(
        model=str(model), plugins=(*method.split("+"), "hf"), scheme=SCHEME, calib=text, eval=text,
        samples=SAMPLES, seq_len=LENGTH, device="cpu", out=out,
    )  # fmt: skip
    plan = pipeline.plan(request, Plugins.load())
    return RunDir.create(out, plan.settings, to_yaml(plan.recipe)).path


def commands(model: Path, method: str, tokens: Path, work: Path, peers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """(tool, command) of everyone who knows the method."""
    yield "qhub", [sys.executable, "-m", "qhub.stage", "quantize", str(planned(model, method, work / f"qhub-{time.time_ns()}"))]
    for tool, python in peers.items():
        if tool == "gptqmodel" and method != "gptq":
            continue  # its AWQ asserts on these shapes on a CPU, and it has no RTN of its own
        script = str(HERE / "peers" / f"{tool}_run.py")
        yield tool, [python, script, str(model), str(tokens), str(work / tool), "--method", method]


def main() -> None:
    """Read the arguments; print one JSON line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--llmcompressor", help="the Python of its environment")
    parser.add_argument("--gptqmodel", help="the Python of its environment")
    args = parser.parse_args()
    peers = {name: value for name, value in (("llmcompressor", args.llmcompressor), ("gptqmodel", args.gptqmodel)) if value}
    layers = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        work, tokens = Path(folder), Path(folder) / "tokens.npy"
        make = [sys.executable, str(HERE / "peers" / "tokens.py"), str(args.model), str(args.model / "calibration.txt"), str(tokens)]
        subprocess.run([*make, "--samples", str(SAMPLES), "--length", str(LENGTH)], check=True, stdout=subprocess.DEVNULL)
        for method in args.methods:
            for _ in range(args.rounds):
                for tool, command in commands(args.model, method, tokens, work, peers):
                    seconds, peak = timed(command)
                    row = {"model": args.model.name, "layers": layers, "method": method, "tool": tool}
                    print(json.dumps({**row, "seconds": round(seconds, 1), "peak_rss_gb": round(peak / 1e9, 2)}), flush=True)


if __name__ == "__main__":
    main()
