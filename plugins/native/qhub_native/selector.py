"""The kernel selector: which kernel and which tiles are fastest for a shape on this machine, found by measuring, and remembered.

For every distinct shape of a model and every bucket of rows the candidates are timed for some milliseconds, with the matrices of
all layers in turn so that they come from memory as they do in use. The winners are kept in the user's cache by CPU model,
version of this plugin and number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata

from qhub import cpu_model, read_cache, write_cache
from qhub_native._native import Linear, Pool, bucket, kernel_names, read_bandwidth, time_plan

CACHE = "native-kernels.json"
#: A number of rows that stands for each bucket: 1, 2 … 4, 5 … 8, 9 … 64, more.
ROWS = (1, 4, 8, 32, 128)
_ALIKE = 1.03  # times within this are not told apart
_SECONDS = (0.004, 0.004, 0.004, 0.01, 0.03)
#: (rows, blocks) of tiles; 0 blocks: an eighth of a thread's share.
TILES = (
    ((1, 0), (1, 4), (1, 8), (1, 16)),
    ((4, 0), (4, 4), (4, 16)),
    ((8, 0), (8, 4), (8, 16)),
    ((64, 0), (64, 4), (32, 16)),
    ((96, 0), (48, 16), (192, 4), (192, 16)),
)


@dataclass(frozen=True)
class Choice:
    """The plan of one shape and bucket, and what it took when it was measured."""

    kernel: str
    rows: int
    blocks: int
    seconds: float


@dataclass(frozen=True)
class ShapeKey:
    """Products that are alike: inputs K, outputs N, and how the weights are stored."""

    inputs: int
    outputs: int
    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}-w{self.bits}-g{self.group}-{'sym' if self.symmetric else 'asym'}"


class Selector:
    """Plans for the matrices of one model. `linears` are its packed ones by shape; `head` is the shape of the head."""

    def __init__(self, linears: Mapping[ShapeKey, list[Linear]], head: ShapeKey | None, pool: Pool, kernel: str | None) -> None:
        self.linears, self.head, self.pool = linears, head, pool
        self.kernels = [kernel] if kernel else [name for name in kernel_names() if name != "scalar"] or ["scalar"]
        self._ready: set[tuple[ShapeKey, int]] = set()
        self._forced = kernel is not None

    @cached_property
    def _place(self) -> str:
        return f"{cpu_model()}; {metadata.version('qhub-native')}; {self.pool.threads} threads"

    def prepare(self, rows: int, head_rows: int) -> None:
        """See to it that products of so many rows have their plans: remembered ones, or measured now."""
        wanted = {(key, bucket(head_rows if key == self.head else rows)) for key in self.linears} - self._ready
        if not wanted:
            return
        known = {} if self._forced else self._remembered()
        for key, index in sorted(wanted, key=str):
            name = f"{key} m{ROWS[index]}"
            choice = known.get(name)
            if choice is None or choice.kernel not in self.kernels:
                choice = self.measure(self.linears[key], index)
                self._remember(name, choice)
            for linear in self.linears[key]:
                linear.set_plan(index, choice.kernel, choice.rows, choice.blocks)
            self._ready.add((key, index))

    def measure(self, alike: list[Linear], index: int) -> Choice:
        """The fastest of the candidates; of those about as fast, the first."""
        found = list(self.candidates(alike, index))
        least = min(choice.seconds for choice in found)
        return next(choice for choice in found if choice.seconds <= _ALIKE * least)

    def candidates(self, alike: list[Linear], index: int) -> Iterator[Choice]:
        """The best two kernels (the list is best first) with the first tiling, the faster one with the others."""
        first = [self._timed(alike, index, kernel, *TILES[index][0]) for kernel in self.kernels[:2]]
        yield from first
        best = min(first, key=lambda choice: choice.seconds).kernel
        for rows, blocks in TILES[index][1:]:
            yield self._timed(alike, index, best, rows, blocks)

    def _timed(self, alike: list[Linear], index: int, kernel: str, rows: int, blocks: int) -> Choice:
        times = sorted(time_plan(alike, self.pool, ROWS[index], kernel, rows, blocks, _SECONDS[index]))
        return Choice(kernel, rows, blocks, times[len(times) // 4])  # others' work disturbs the rest

    def _remembered(self) -> dict[str, Choice]:
        entries = read_cache(CACHE).get(self._place)
        if not isinstance(entries, Mapping):
            return {}
        return {name: Choice(**entry) for name, entry in entries.items() if _is_choice(entry)}

    def _remember(self, name: str, choice: Choice) -> None:
        if self._forced:
            return
        everything = read_cache(CACHE)
        entries = everything.get(self._place)
        kept = entries if isinstance(entries, Mapping) else {}
        everything[self._place] = {**kept, name: asdict(choice)}
        write_cache(CACHE, everything)


def _is_choice(entry: object) -> bool:
    expected = {"kernel": str, "rows": int, "blocks": int, "seconds": float}
    if not isinstance(entry, Mapping) or set(entry) != set(expected):
        return False
    return all(isinstance(entry[name], kind) for name, kind in expected.items()) and entry["rows"] > 0 and entry["blocks"] >= 0


def bandwidth(pool: Pool) -> float:
    """Bytes per second that the pool's threads read from memory here, far beyond what caches hold; takes half a second."""
    return float(read_bandwidth(pool, 512 << 20, 0.5))


def by_shape(entries: Iterable[tuple[ShapeKey, Linear]]) -> dict[ShapeKey, list[Linear]]:
    """The matrices by what they have in common."""
    found: dict[ShapeKey, list[Linear]] = {}
    for key, linear in entries:
        found.setdefault(key, []).append(linear)
    return found
