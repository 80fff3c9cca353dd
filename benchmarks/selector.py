"""The kernel selector against every fixed choice: total milliseconds of a model's products, by rows of activations.

    python benchmarks/selector.py QUANTIZED_DIR [--threads N] [--rounds 3]

A fixed choice is one kernel with one tiling for all shapes. All are timed anew, in turn, and the selector's plans with them; the
best round of each shape counts, as the least disturbed one.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from qhub_native._native import kernel_names, time_plan
from qhub_native.load import load
from qhub_native.selector import ROWS, TILES, Selector
from qhub_native.settings import chosen

from qhub import OpenOptions

Plan = tuple[str, int, int]
SECONDS = 0.03


def fixed_choices(bucket: int) -> list[Plan]:
    """Every kernel that is not the reference, with every tiling of the bucket."""
    kernels = [name for name in kernel_names() if name != "scalar"] or ["scalar"]
    return [(kernel, rows, blocks) for kernel in kernels for rows, blocks in TILES[bucket]]


def totals(selector: Selector, bucket: int, rounds: int) -> dict[str, float]:
    """Choice → seconds of all products of the model, the selector's first."""
    found: dict[str, float] = defaultdict(float)
    for alike in selector.linears.values():
        choice = selector.measure(alike, bucket)
        plans = {"the selector's": (choice.kernel, choice.rows, choice.blocks)}
        plans |= {f"{kernel} {rows} × {blocks or 'share'}": (kernel, rows, blocks) for kernel, rows, blocks in fixed_choices(bucket)}
        best = dict.fromkeys(plans, float("inf"))
        for _ in range(rounds):
            for name, plan in plans.items():
                best[name] = min(best[name], statistics.median(time_plan(alike, selector.pool, ROWS[bucket], *plan, SECONDS)))
        for name, seconds in best.items():
            found[name] += len(alike) * seconds
    return found


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    selector = load(options.model, chosen(OpenOptions(threads=options.threads))).selector
    for bucket, rows in enumerate(ROWS):
        print(f"\n| {rows} rows, {selector.pool.threads} threads | ms |\n|---|---|")
        for name, seconds in sorted(totals(selector, bucket, options.rounds).items(), key=lambda entry: entry[1]):
            print(f"| {name} | {seconds * 1e3:.2f} |")


if __name__ == "__main__":
    main()
