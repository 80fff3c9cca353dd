"""Perplexity and KL of float, RTN and our methods on one model, one row per scheme and method.

    python benchmarks/quality.py MODEL --calib TEXT --eval TEXT [--schemes w4a16-g128-asym …] [--out FILE.jsonl]

Runs `qhub run` for each scheme and method (64 × 512 calibration tokens, 60 windows of 512 for evaluation, the defaults)
and reads the figures from its report.json. The peers' rows come from `benchmarks/peers`, on the same windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    args = parser.parse_args()
    texts = [word for name in ("calib", "eval") if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    for row in rows(args.model, args.schemes, texts):
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
