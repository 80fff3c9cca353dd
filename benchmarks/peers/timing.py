"""What the runners that only measure speed share: arguments, the series of runs, the result line. Standard library only."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

Run = Callable[[int, int], tuple[float, float]]
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Timing:
    """What is to be measured: lengths in tokens."""

    model: str
    threads: int
    prompt: tuple[int, ...]
    generate: int
    repeat: int


def parse_timing(description: str | None) -> Timing:
    """The command line of a speed runner."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file or folder that this tool opens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1)
    args = vars(parser.parse_args())
    return Timing(**{**args, "prompt": tuple(args["prompt"])})


def print_timing(asked: Timing, load: Callable[[], Run], tool: dict[str, str]) -> None:
    """Load, warm up, measure, print one JSON line.

    A run takes the lengths of a prompt and of the reply (at least 1), and tells the seconds to the first token of the reply and
    per token after it. The reply is measured behind the shortest prompt only.
    """
    start = time.perf_counter()
    run = load()
    loaded = time.perf_counter()
    shortest = min(asked.prompt)
    run(shortest, WARM_UP_TOKENS)
    replies = [run(shortest, asked.generate) for _ in range(asked.repeat)]
    firsts = {shortest: [first for first, _ in replies]}
    firsts |= {length: [run(length, 1)[0] for _ in range(asked.repeat)] for length in asked.prompt if length != shortest}
    figures = {
        "load_s": loaded - start,
        "prompt_tokens_per_s": {length: [length / first for first in found] for length, found in firsts.items()},
        "generate_tokens_per_s": [1 / each for _, each in replies],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps({**tool, **figures}), flush=True)
