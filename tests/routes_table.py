"""The rows of routes.yaml as values, and docs/seed-coverage.md, which is written from them: `python tests/routes_table.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from profiles import MODELS  # noqa: E402 - found through the line above when this file is run
from toy_components import installed  # noqa: E402

from qhub.route.recommend import recommend  # noqa: E402
from qhub.route.registry import load_registry  # noqa: E402
from qhub.types import Fact, Goals, Recommendation, Target  # noqa: E402

DOCUMENT = HERE.parent / "docs" / "seed-coverage.md"
REGISTRY = load_registry()
DATA = yaml.safe_load((HERE / "routes.yaml").read_text(encoding="utf-8"))
ELSEWHERE: Mapping[str, str] = {str(seed): why for seed, why in DATA["elsewhere"].items()}
SEEDS = [f"{guide:03} {name} / {row}" for guide, tables in DATA["seeds"].items() for name, lines in tables.items() for row in lines]


def device(name: str) -> Target:
    """A device of the registry, or of the table's own."""
    if name in REGISTRY.targets:
        return REGISTRY.targets[name]
    facts = dict(DATA["devices"][name])
    rates = {"bandwidth": ("bandwidth_bytes_per_s", 1e9), "fp16": ("fp16_flops_per_s", 1e12)}
    peaks = {field: Fact(facts.pop(key) * factor, "its data sheet") for key, (field, factor) in rates.items() if key in facts}
    return Target(name, name, accelerators=tuple(facts.pop("accelerators")), **peaks, **facts)


@dataclass(frozen=True)
class Row:
    """One row: a question and the expert's answer."""

    seed: Any
    model: str
    target: str
    first: tuple[str, str, str] = ("", "", "")
    because: str = ""
    rejected: Mapping[str, str] = field(default_factory=dict)
    goals: Mapping[str, Any] = field(default_factory=dict)
    have: tuple[str, ...] = ()
    refused: str = ""
    fits: bool = True
    size: tuple[float, float] | None = None

    @property
    def seeds(self) -> tuple[str, ...]:
        """The rows of the guides that it covers."""
        return (self.seed,) if isinstance(self.seed, str) else tuple(self.seed)

    @cached_property
    def device(self) -> Target:
        """The facts of the target."""
        return device(self.target)

    @property
    def title(self) -> str:
        """The question in a line."""
        goals = "".join(f", {key} {value}" for key, value in self.goals.items())
        return f"{self.model} on {self.target}{goals}" + (f" with {'+'.join(self.have)}" if self.have else "")

    def recommend(self) -> Recommendation:
        """What qhub answers."""
        given = self.goals
        goals = Goals(
            max_drop_pct=given.get("max_drop", 2.0),
            max_size_bytes=int(given["max_size"] * 1e6) if "max_size" in given else None,
            max_latency_ms=given.get("max_latency"),
            max_memory_bytes=int(given["max_memory"] * 1e9) if "max_memory" in given else None,
            retrain=given.get("retrain", False),
            batch=given.get("batch", 1),
        )
        return recommend(MODELS[self.model], [self.device], goals, installed(self.have), registry=REGISTRY)


ROWS = tuple(Row(**{**row, "first": tuple(row.get("first", ())), "have": tuple(row.get("have", ()))}) for row in DATA["routes"])


def document() -> str:
    """docs/seed-coverage.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Which row of the guides is answered by which route"
    yield ""
    yield "Written by `python tests/routes_table.py` from `tests/routes.yaml`; `tests/test_routes_table.py` runs every row and holds this"
    yield "page current. 003 is the technical report, 004 the guide. A finisher marked (missing) is not installed in its row."
    for guide, tables in DATA["seeds"].items():
        for name, lines in tables.items():
            yield from ("", f"## {guide:03} {name}", "")
            yield from ("| row | question | method | scheme | finished by | because |", "|---|---|---|---|---|---|")
            for line in lines:
                yield from _of_seed(f"{guide:03} {name} / {line}", line)


def _of_seed(seed: str, line: str) -> Iterator[str]:
    if seed in ELSEWHERE:
        yield f"| {line} | – | – | – | – | not a question of routing: {ELSEWHERE[seed]} |"
    for row in ROWS:
        if seed in row.seeds:
            rejected = "; ".join(f"{what} is rejected: {why}" for what, why in row.rejected.items())
            first = row.first if not row.refused else ("refused", "–", "–")
            yield f"| {line} | {row.title} | {' | '.join(first)} | {'; '.join(filter(None, (row.because, rejected, row.refused)))} |"


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it is current."""
    text = document()
    if arguments == ["--check"]:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
            print(f"{DOCUMENT} is not current: run `python tests/routes_table.py`", file=sys.stderr)
            return 1
        return 0
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
