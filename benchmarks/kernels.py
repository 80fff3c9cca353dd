"""Microseconds of one 4-bit matrix product, ours and the peers' kernels in turn, for the matrix shapes of language models.

    python benchmarks/kernels.py [--ggml BUILD/bin/ggml_matmul …] [--onnxruntime PY] [--openvino PY] [--torch PY]
                                 [--shapes 2048x2048 …] [--rows 1 4 8 32 512] [--threads 1 2] [--rounds 5] [--out FILE.jsonl]

K×N: K inputs, N outputs. Up to 8 rows of activations the weights come from memory (enough copies that no cache holds them), from
32 rows on one matrix is used again and again. Each engine is one process that prepares a matrix, then answers in turn with the
others, `--rounds` times; printed is the best round's median, as the least disturbed one. Peers: `benchmarks/peers/README.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
SHAPES = ("2048x2048", "2048x5632", "5632x2048", "2048x32000", "4096x4096", "4096x11008")
CACHED_ROWS = 32  # from here on the weights may stay in cache: they are used often enough
UNCACHED_BYTES = 160_000_000


@dataclass(frozen=True)
class Product:
    """K inputs × N outputs, M rows."""

    inputs: int
    outputs: int
    rows: int
    threads: int

    @property
    def copies(self) -> int:
        """Distinct matrices to go through."""
        return 1 if self.rows >= CACHED_ROWS else -(-UNCACHED_BYTES // (self.inputs * self.outputs // 2))

    @property
    def repeats(self) -> int:
        """Repeats per answer: more where one is short."""
        return 3 if self.copies > 1 else max(3, min(20, 2**33 // (self.inputs * self.outputs * self.rows)))


class Server:
    """A process that answers products with microseconds; see `peers/matmul.py`."""

    def __init__(self, name: str, command: list[str]) -> None:
        """Start it; `name` heads its column."""
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Server:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def measure(self, product: Product) -> float | None:
        """Microseconds, the median of the repeats; None once the process has ended, which it says itself on stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sizes = (product.inputs, product.outputs, product.rows, product.threads, product.copies, product.repeats)
        try:
            print(*sizes, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return None
        answer = self._process.stdout.readline().split()
        return statistics.median(map(float, answer)) if answer else None


def servers(args: argparse.Namespace) -> Iterator[Server]:
    """Ours and every peer that was named and is there."""
    ours = [] if args.without_qhub else [("qhub", Path(sys.executable))]
    named = [*ours, *((name, getattr(args, name)) for name in ("onnxruntime", "openvino", "torch"))]
    candidates = [(name, path, [str(path), str(PEERS / "matmul.py"), name]) for name, path in named if path]
    candidates += [(f"ggml {path.parent.parent.name} {kind}", path, [str(path), kind]) for path in args.ggml for kind in args.ggml_types]
    for name, path, command in candidates:
        if path.exists():
            yield Server(name, command)
        else:
            print(f"{name} is not run: no `{path}`", file=sys.stderr)


def products(args: argparse.Namespace) -> Iterator[Product]:
    """Every shape, with every number of rows and threads."""
    for shape in args.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for rows, threads in itertools.product(args.rows, args.threads):
            yield Product(inputs, outputs, rows, threads)


def best(product: Product, found: list[Server], rounds: int) -> dict[str, float]:
    """Microseconds by engine: its best round. The first answer of each prepares the matrix and does not count."""
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for server in found:
            answer = server.measure(product)
            if answer is not None and number:
                times.setdefault(server.name, []).append(answer)
    return {name: min(values) for name, values in times.items()}


def row(product: Product, times: dict[str, float], names: list[str]) -> str:
    """A Markdown line: microseconds per engine, and how many times faster ours is than the best peer."""
    peers = [value for name, value in times.items() if name != "qhub"]
    ratio = f"{min(peers) / times['qhub']:.2f}" if peers and "qhub" in times else ""
    cells = [f"{times[name]:,.0f}" if name in times else "" for name in names]
    return f"| {product.inputs}×{product.outputs} | {product.rows} | {product.threads} | {' | '.join(cells)} | {ratio} |"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, nargs="+", default=[], help="programs of peers/ggml_matmul.cpp")
    parser.add_argument("--ggml-types", nargs="+", default=["q4_0"])
    for name in ("onnxruntime", "openvino", "torch"):
        parser.add_argument(f"--{name}", type=Path, help="the Python of its environment")
    parser.add_argument("--without-qhub", action="store_true", help="peers only")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines: one per product")
    return parser.parse_args()


def main() -> None:
    """Print the table, line by line as it is measured."""
    args = parse()
    with ExitStack() as running:
        found = [running.enter_context(server) for server in servers(args)]
        names = [server.name for server in found]
        print(f"| K×N | M | threads | {' | '.join(names)} | best peer ÷ qhub |\n" + "|---" * (len(names) + 4) + "|")
        for product in products(args):
            times = best(product, found, args.rounds)
            print(row(product, times, names), flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    print(json.dumps({**vars(product), "us": times}), file=file)


if __name__ == "__main__":
    main()
