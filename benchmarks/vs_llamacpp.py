"""Tokens per second of this project's runtime and of its peers on the same model, in turn (A B A B …), in one go.

    python benchmarks/vs_llamacpp.py QUANTIZED_DIR --llama-bench NATIVE/bin/llama-bench VNNI/bin/llama-bench
        --gguf MODEL-Q4_0.gguf MODEL-Q4_K_M.gguf [--openvino OV/bin/python --openvino-model MODEL-Q4_0.gguf]
        [--transformers PY/bin/python --float-model HF_FOLDER] [--threads 1 2] [--prompt 512] [--generate 128] [--rounds 5]

Every engine is one process per round: it loads, warms up, and measures each length once. The bandwidth of the memory is read
in the same rounds. Printed: medians (smallest–largest) and the ratio to the best peer; `--out` keeps every single figure.
The column `others` is what else ran on the machine meanwhile, in processors; a run with more than `--tolerate` is repeated,
at most twice, and the quietest counts.
How to build the peers: `benchmarks/peers/README.md`. A peer whose file is absent is left out with a line on stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from bandwidth import read_bandwidth
from engines import Engine, Load, Speed, llama_bench, present, qhub, runner

TRIES = 3
Series = dict[str, dict[str, list[float]]]


def add_peers(parser: argparse.ArgumentParser) -> None:
    """Arguments that name our model and the peers; what `engines` reads."""
    parser.add_argument("model", type=Path, nargs="*", help="QuantizedModel folders; the first is compared with the peers")
    parser.add_argument("--llama-bench", type=Path, nargs="+", default=[])
    parser.add_argument("--gguf", type=Path, nargs="+", default=[])
    parser.add_argument("--openvino", type=Path, help="the Python of its environment")
    parser.add_argument("--openvino-model", type=Path, help="GGUF file or OpenVINO folder")
    parser.add_argument("--transformers", type=Path, help="the Python of its environment")
    parser.add_argument("--float-model", type=Path, help="Hugging Face folder for transformers")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peers(parser)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, nargs="*", default=[512])
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tolerate", type=float, default=0.05)
    parser.add_argument("--out", type=Path, help="JSON lines: every measurement, as it comes")
    return parser.parse_args()


def engines(args: argparse.Namespace) -> list[Engine]:
    """Ours first, then every peer that is there."""
    found = [(qhub(folder), (folder,)) for folder in args.model]
    found += [(llama_bench(program, file), (program, file)) for program in args.llama_bench for file in args.gguf]
    if args.openvino and args.openvino_model:
        found.append((runner(args.openvino, "openvino_run.py", args.openvino_model), (args.openvino, args.openvino_model)))
    if args.transformers and args.float_model:
        found.append((runner(args.transformers, "transformers_run.py", args.float_model), (args.transformers, args.float_model)))
    return present(found)


def quietest(engine: Engine, load: Load, tolerated: float) -> Speed:
    """The first of up to three runs that others left alone, else the one they disturbed least."""
    tries: list[Speed] = []
    while not tries or (tries[-1].others > tolerated and len(tries) < TRIES):
        tries.append(engine.measure(load))
    return min(tries, key=lambda speed: speed.others)


def figures(speed: Speed, load: Load) -> dict[str, float]:
    """A run as columns of the table."""
    found = {f"prompt {length}": speed.prompt[length] for length in load.prompts}
    found |= {"generation": speed.generate, "peak MiB": speed.peak_rss_bytes / 2**20, "others": speed.others}
    if speed.load_s is not None:
        found["load s"] = speed.load_s
    if speed.bandwidth_share is not None:
        found["of memory"] = speed.bandwidth_share
    return found


def one_round(found: list[Engine], load: Load, tolerated: float) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, columns): the memory, then every engine. An engine that fails is named on stderr."""
    yield "memory", {"GB/s": read_bandwidth(load.threads)}
    for engine in found:
        try:
            yield engine.name, figures(quietest(engine, load, tolerated), load)
        except RuntimeError as problem:
            print(f"{engine.name}: {problem}", file=sys.stderr)


def table(series: Series, load: Load, ours: str | None) -> Iterator[str]:
    """Markdown lines: one row per engine, medians with extremes, and how ours compares."""
    columns = [*(f"prompt {length}" for length in load.prompts), "generation", "of memory", "GB/s", "peak MiB", "load s", "others"]
    yield f"| {load.threads} thread{'s' * (load.threads > 1)} | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in series.items():
        yield f"| {name} | " + " | ".join(_cell(row.get(column)) for column in columns) + " |"
    if ours in series:
        yield "| qhub ÷ best peer | " + " | ".join(_ratio(series, column, ours) for column in columns) + " |"


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def _ratio(series: Series, column: str, ours: str | None) -> str:
    peers = [row[column] for name, row in series.items() if name != "memory" and not name.startswith("qhub") and column in row]
    if ours is None or not peers or column == "others" or column not in series[ours]:
        return ""
    best = min if column in ("peak MiB", "load s") else max
    return f"{statistics.median(series[ours][column]) / best(map(statistics.median, peers)):.2f}"


def main() -> None:
    """Measure and print, one table per number of threads."""
    args = parse()
    found = engines(args)
    for threads in args.threads:
        load = Load(threads, tuple(args.prompt), args.generate)
        series: Series = defaultdict(lambda: defaultdict(list))
        for name, columns in (row for _ in range(args.rounds) for row in one_round(found, load, args.tolerate)):
            for column, value in columns.items():
                series[name][column].append(value)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    print(json.dumps({"threads": threads, "engine": name, **columns}), file=file)
        print("\n" + "\n".join(table(series, load, found[0].name if args.model else None)), flush=True)


if __name__ == "__main__":
    main()
