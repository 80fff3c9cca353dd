"""Do other tools load what we write, and do we read what they write? Codes and logits, one JSON line each.

    python benchmarks/layouts.py MODEL TEXT --work DIR --gptqmodel gptqm/bin/python --llmcompressor llmc/bin/python

MODEL is a float folder, TEXT its calibration text; the environments are those of benchmarks/peers/README.md. Ours: one run per
scheme, carried into every layout; each is loaded by the other tools and its logits compared with ours. Theirs: models made by
those tools (kept in DIR), read by us, logits compared with theirs, then carried into every layout. All logits are computed in
float32, from the numbers in the files, except by transformers with GPTQModel's kernels, which compute in bf16 or fp16. Exits
with 1 where a difference is larger than `--limit`, or than a hundredth of the largest logit where a kernel rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qhub.errors import QhubError
from qhub.quantize.layouts.reader import LAYOUTS, PackedWeights, open_packed
from qhub.quantize.layouts.writer import write_layout
from qhub.skeleton import Skeleton, run_block

PEERS = Path(__file__).parent / "peers"
SCHEMES = ("w4a16-g64-asym", "w4a16-g64-sym", "w8a16-g64-asym")
#: name → (tool, options of its runner)
THEIRS = {
    "gptqmodel-sym": ("gptqmodel", "--method gptq --group-size 128 --symmetric"),
    "gptqmodel-asym": ("gptqmodel", "--method gptq --group-size 64"),
    "gptqmodel-desc-act": ("gptqmodel", "--method gptq --group-size 64 --variant desc-act"),
    "gptqmodel-3-bit": ("gptqmodel", "--method gptq --bits 3 --group-size 64"),
    "gptqmodel-8-bit": ("gptqmodel", "--method gptq --bits 8 --group-size 32"),
    "gptqmodel-mixed": ("gptqmodel", "--method gptq --group-size 128 --ignore down_proj"),
    "gptqmodel-awq": ("gptqmodel", "--method awq --group-size 64 --dtype float16"),
    "llmcompressor-asym": ("llmcompressor", "--method gptq --group-size 64"),
    "llmcompressor-sym": ("llmcompressor", "--method rtn --group-size 128 --symmetric"),
    "llmcompressor-channel": ("llmcompressor", "--method rtn --group-size -1 --symmetric"),
    "llmcompressor-8-bit": ("llmcompressor", "--method rtn --bits 8 --group-size 32"),
}
#: Which tools load which layout here.
LOADERS = {
    "compressed-tensors": ("llmcompressor",),
    "awq": ("gptqmodel", "gptqmodel+transformers"),
    "gptq": ("gptqmodel",),
    "gptq_v2": ("gptqmodel", "gptqmodel+transformers"),
}


@dataclass(frozen=True)
class Bench:
    """What is compared, where, and which interpreters have the tools."""

    model: Path
    text: Path
    work: Path
    pythons: dict[str, str]

    @property
    def tokens(self) -> Path:
        """The calibration tokens; the first sample is also what logits are compared on."""
        return self.work / "tokens.npy"

    def call(self, python: str, *arguments: object) -> str | None:
        """Run a script; None if it worked, else the last line that it said."""
        ran = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, check=False)
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        return None if ran.returncode == 0 else (lines[-1] if lines else f"exit code {ran.returncode}")

    def load(self, loader: str, folders: list[Path]) -> dict[Path, dict[str, Any]]:
        """How far the logits of a tool are from ours, for each folder; one process loads all of them."""
        tool, _, inside = loader.partition("+")
        kind = "gptqmodel" if tool == "gptqmodel" and not inside else "transformers"
        outs = {folder: self.work / f"logits-{index}.npy" for index, folder in enumerate(folders)}
        for out in outs.values():
            out.unlink(missing_ok=True)
            out.with_suffix(".txt").unlink(missing_ok=True)
        pairs = (f"{folder}={out}" for folder, out in outs.items())
        failed = self.call(self.pythons[tool], PEERS / "logits.py", self.tokens, *pairs, "--tool", kind)
        return {folder: {"loader": loader, **self._compared(folder, out, failed)} for folder, out in outs.items()}

    def _compared(self, folder: Path, out: Path, failed: str | None) -> dict[str, Any]:
        if not out.exists():
            why = out.with_suffix(".txt")
            return {"refused": why.read_text(encoding="utf-8") if why.exists() else failed}
        theirs, ours = np.load(out), own_logits(folder, torch.from_numpy(np.load(self.tokens))[:1])
        return {"max_abs_diff": float(np.abs(theirs - ours).max()), "largest_logit": float(np.abs(ours).max())}


@dataclass(frozen=True)
class Case:
    """A folder, what is known of it, and who is to load it."""

    row: dict[str, Any]
    folder: Path | None = None
    loaders: tuple[str, ...] = ()


class Exact(PackedWeights):
    """Weights in float32, unrounded, whatever the model's dtype."""

    def model_dtype(self) -> torch.dtype:
        """What weights are given in."""
        return torch.float32


@torch.no_grad()
def own_logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """Logits (length, vocab) float32 of ids (1, length), by our reader and the float model's code."""
    skeleton = Skeleton(Exact(folder, open_packed(folder).source.section))
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    for index in range(len(skeleton.block_names)):
        with skeleton.block(index) as module:
            hidden = run_block(module, hidden, calls[index])
    return skeleton.logits(ids, hidden)[0].numpy()


def carried(source: Path, work: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """`source` in every layout: (layout, folder, what was found)."""
    there = open_packed(source)
    for layout in LAYOUTS:
        if layout == there.layout.name:
            continue
        out = work / layout
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            write_layout(source, out, layout)
        except QhubError as error:
            shutil.rmtree(out)
            yield layout, out, {"carried": False, "why": error.message.partition(": ")[2]}
            continue
        again = open_packed(out)
        identical = all(there.layer(name).equals(again.layer(name)) for name in there.layers)
        yield layout, out, {"carried": True, "layers": len(again.layers), "codes_identical": identical}


def ours(bench: Bench) -> Iterator[Case]:
    """One run per scheme, in every layout, loaded by everybody."""
    for scheme in SCHEMES:
        run = bench.work / f"run-{scheme}"
        row: dict[str, Any] = {"ours": scheme}
        if not (run / "report.json").exists():
            options = ("--plugin", "gptq", "--scheme", scheme, "--calib", bench.text, "--eval", bench.text, "--seq-len", 128)
            failed = bench.call(sys.executable, "-m", "qhub", "run", bench.model, *options, "--out", run)
            if failed is not None:
                yield Case({**row, "failed": failed})
                continue
        source = run / "quantized"
        yield Case({**row, "layout": "compressed-tensors"}, source, LOADERS["compressed-tensors"])
        for layout, folder, found in carried(source, bench.work / f"ours-{scheme}"):
            yield Case({**row, "layout": layout, **found}, folder, LOADERS[layout] if found["carried"] else ())


def theirs(bench: Bench) -> Iterator[Case]:
    """Their models: read by us, then carried into every layout."""
    for name, (tool, options) in THEIRS.items():
        folder = bench.work / name
        if not (folder / "config.json").exists():
            runner = PEERS / f"{tool}_run.py"
            failed = bench.call(bench.pythons[tool], runner, bench.model, bench.tokens, folder, *options.split(), "--threads", 1)
            if failed is not None:
                yield Case({"theirs": name, "failed": failed})
                continue
        row = {"theirs": name, "layout": open_packed(folder).layout.name}
        yield Case(row, folder, (tool,))
        for layout, _, found in carried(folder, bench.work / f"{name}-carried"):
            yield Case({**row, "to": layout, **found})


def rows(bench: Bench, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """What is known of each case, once for each tool that loads it."""
    loaders = sorted({loader for case in cases for loader in case.loaders})
    loaded = {}
    for loader in loaders:
        folders = [case.folder for case in cases if loader in case.loaders and case.folder is not None]
        loaded[loader] = bench.load(loader, folders)
    for case in cases:
        if not case.loaders:
            yield case.row
        for loader in case.loaders:
            assert case.folder is not None
            yield {**case.row, **loaded[loader][case.folder]}


def main() -> int:
    """Read the arguments, print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gptqmodel", required=True, help="the interpreter that has GPTQModel")
    parser.add_argument("--llmcompressor", required=True, help="the interpreter that has llm-compressor")
    parser.add_argument("--limit", type=float, default=1e-3, help="largest difference of a logit")
    parser.add_argument("--only", choices=["ours", "theirs"], help="half of it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.text, args.work, {"gptqmodel": args.gptqmodel, "llmcompressor": args.llmcompressor})
    sizes = ("--samples", 8, "--length", 128)
    if not bench.tokens.exists() and (
        failed := bench.call(sys.executable, PEERS / "tokens.py", args.model, args.text, bench.tokens, *sizes)
    ):
        print(failed, file=sys.stderr)
        return 1
    cases = [case for part in (ours, theirs) if args.only in (None, part.__name__) for case in part(bench)]
    wrong = False
    for row in rows(bench, cases):
        print(json.dumps(row), flush=True)
        limit = 0.01 * row.get("largest_logit", 0.0) if "+" in row.get("loader", "") else args.limit
        wrong |= row.get("max_abs_diff", 0.0) > limit or row.get("codes_identical") is False or "failed" in row
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
