"""What a third busy process on the machine costs each engine: the quiet and the disturbed speed, in turn.

    python benchmarks/busy.py QUANTIZED_DIR --llama-bench NATIVE/bin/llama-bench --gguf MODEL-Q4_0.gguf
        [--openvino OV/bin/python --openvino-model MODEL-Q4_0.gguf] [--threads 2] [--rounds 5] [--busy 1]

The busy process computes without memory traffic and without a pause, at the same priority as the engine. An engine on all of C
cores beside one such process can keep C / (C + 1) of its speed if its threads share work out as they come for it; one whose
threads wait for each other at a barrier keeps less, and one whose waiting threads spin may keep next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from engines import Load, Speed
from vs_llamacpp import add_peers, engines

SPIN = "while True: pass"
Runs = dict[tuple[str, bool], list[Speed]]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes computing meanwhile. They belong to this session, so that the scheduler treats them as equals."""
    with ExitStack() as running:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            running.callback(process.wait)
            running.callback(process.kill)
        yield


def measure(args: argparse.Namespace) -> Runs:
    """Speeds by (engine, disturbed)."""
    found, load, runs = engines(args), Load(args.threads, tuple(args.prompt), args.generate), defaultdict(list)
    for _ in range(args.rounds):
        for engine in found:
            for disturbed in (False, True):
                with busy_processes(args.busy if disturbed else 0):
                    try:
                        runs[engine.name, disturbed].append(engine.measure(load))
                    except RuntimeError as problem:
                        print(f"{engine.name}: {problem}", file=sys.stderr)
    return runs


def table(runs: Runs, prompt: int) -> Iterator[str]:
    """Markdown lines: median tokens/s quiet → disturbed, what is left, and the worst disturbed run."""
    yield f"| | prompt {prompt}: quiet | busy | left | generation: quiet | busy | left | worst busy |"
    yield "|---" * 8 + "|"
    for name in dict.fromkeys(name for name, _ in runs):
        quiet, disturbed = runs[name, False], runs[name, True]
        if not quiet or not disturbed:
            continue
        prompts = [statistics.median(speed.prompt[prompt] for speed in speeds) for speeds in (quiet, disturbed)]
        generations = [statistics.median(speed.generate for speed in speeds) for speeds in (quiet, disturbed)]
        cells = [f"{before:.4g} | {after:.4g} | {after / before:.0%}" for before, after in (prompts, generations)]
        yield f"| {name} | {' | '.join(cells)} | {min(speed.generate for speed in disturbed):.4g} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peers(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs=1, default=[512])
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="how many busy processes")
    args = parser.parse_args()
    print("\n".join(table(measure(args), args.prompt[0])))


if __name__ == "__main__":
    main()
