"""Perplexity and KL of float, RTN, our methods and the peers' on one model, one row per scheme and method.

    python benchmarks/quality.py MODEL --calib TEXT --eval TEXT [--schemes w4a16-g128-asym …] [--out FILE.jsonl]
                                 [--llmcompressor LLMC/bin/python] [--gptqmodel GPTQM/bin/python] [--peer-model FOLDER] [--ignore down_proj]

Runs `qhub run` for each scheme and method (64 × 512 calibration tokens, 60 windows of 512 for evaluation, the defaults)
and reads the figures from its report.json. The peers (environments: `benchmarks/peers/README.md`) get the same tokens and
are judged on the same windows; one that fails is a row that says so. `--ignore` names layers that the group size does not
divide, which qhub leaves float by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WINDOWS = 60
SCHEMES = ("w4a16-g128-asym", "w4a16-g64-asym", "w4a16-g32-asym", "w3a16-g64-asym")
METHODS = ("awq", "gptq", "awq+gptq")


def report(model: str, scheme: str, method: str, texts: list[str]) -> dict[str, Any]:
    """report.json of one run; an empty dict when qhub refuses the combination (the reason is on stderr)."""
    plugins = [word for name in method.split("+") for word in ("--plugin", name)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qhub", "run", model, *plugins, "--scheme", scheme, *texts, "--out", f"{folder}/run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 5):
            print(f"{scheme} {method}: {done.stderr.strip().splitlines()[-3:]}", file=sys.stderr)
            return {}
        return dict(json.loads(done.stdout))


def rows(model: str, schemes: list[str], texts: list[str]) -> Iterator[dict[str, Any]]:
    """One row per scheme and method, RTN's first."""
    for scheme in schemes:
        for method in METHODS:
            found = report(model, scheme, method, texts)
            if not found:
                continue
            base = found["float"]["perplexity"]
            if method == METHODS[0]:
                yield {"scheme": scheme, "method": "rtn", "float": base, **_figures(found["baseline"])}
            added = found["baseline"]["perplexity"] - base
            recovered = 1 - (found["quantized"]["perplexity"] - base) / added if added > 0 else None
            seconds = next(stage["seconds"] for stage in found["stages"] if stage["name"] == "quantize")
            yield {
                "scheme": scheme,
                "method": method,
                "float": base,
                **_figures(found["quantized"]),
                "recovered": recovered,
                "seconds": seconds,
            }


def peer_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per scheme, tool and method."""
    model = args.peer_model or args.model
    tools = [("llmcompressor", args.llmcompressor, ("awq", "gptq")), ("gptqmodel", args.gptqmodel, ("gptq",))]
    with tempfile.TemporaryDirectory() as folder:
        tokens = f"{folder}/tokens.npy"
        _printed(sys.executable, str(HERE / "peers" / "tokens.py"), args.model, args.calib, tokens)
        for scheme in args.schemes:
            bits, group_size, kind = re.fullmatch(r"w(\d)a16-g(\d+)-(a?sym)", scheme).groups()  # type: ignore[union-attr]
            for tool, python, methods in tools:
                for method in methods if python else ():
                    words = ["--method", method, "--bits", bits, "--group-size", group_size, "--dequantized", f"{folder}/float32"]
                    words += ["--ignore", *args.ignore] if args.ignore else []
                    words += ["--symmetric"] if kind == "sym" else []
                    row = {"scheme": scheme, "method": f"{tool} {method}"}
                    try:
                        _printed(python, str(HERE / "peers" / f"{tool}_run.py"), model, tokens, f"{folder}/out", *words)
                    except subprocess.CalledProcessError as error:
                        yield {**row, "failed": f"exit code {error.returncode}; stderr says why"}
                        continue
                    judge = [sys.executable, str(HERE / "peers" / "evaluate.py"), args.model, args.eval]
                    base, found = _printed(*judge, f"{tool}={folder}/float32", "--windows", str(WINDOWS))[-2:]
                    figures = _figures(json.loads(found))
                    yield {**row, "float": json.loads(base)["perplexity"], **figures}


def _printed(*command: str) -> list[str]:
    """The lines that a command prints; what it says besides goes to stderr."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.strip().splitlines()


def _figures(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in ("perplexity", "kl", "accuracy", "top1_agreement")}


def main() -> None:
    """Read the arguments, print a line per row, and append it to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib")
    parser.add_argument("--eval")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--llmcompressor", help="the Python of its environment")
    parser.add_argument("--gptqmodel", help="the Python of its environment")
    parser.add_argument("--peer-model", help="the same weights in float32, for peers that overflow in float16")
    parser.add_argument("--ignore", nargs="*", help="part of a layer's name, for the peers")
    args = parser.parse_args()
    peers = args.llmcompressor or args.gptqmodel
    if peers and not (args.calib and args.eval):
        parser.error("the peers need --calib and --eval")
    texts = [word for name in ("calib", "eval") if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    for row in chain(rows(args.model, args.schemes, texts), peer_rows(args) if peers else ()):
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
