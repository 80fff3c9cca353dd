"""The tables of docs/routing.md, which are computed: `python tests/routing_page.py` writes them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from profiles import SIX, Decoder, decoder  # noqa: E402 - found through the line above when this file is run
from toy_components import installed  # noqa: E402

from qhub.route.estimate import estimate  # noqa: E402
from qhub.route.matrix import rows  # noqa: E402
from qhub.route.recommend import recommend  # noqa: E402
from qhub.route.registry import load_registry  # noqa: E402
from qhub.route.speed import Speed  # noqa: E402
from qhub.types import Fact, Goals, ModelProfile, Scheme  # noqa: E402

DOCUMENT = HERE.parent / "docs" / "routing.md"
REGISTRY = load_registry()
ANCHORS = yaml.safe_load((HERE / "anchors.yaml").read_text(encoding="utf-8"))
#: What an estimate may be off by.
TOLERANCE = 0.3
HERE_INSTALLED = ("awq", "gptq", "rtn", "hf")


def anchor_estimate(anchor: dict[str, Any]) -> float:
    """Tokens per second that we expect where `anchor` says what was measured."""
    target = REGISTRY.targets[anchor["target"]]
    if "bandwidth" in anchor:
        target = replace(target, bandwidth_bytes_per_s=Fact(anchor["bandwidth"] * 1e9, "peak"))
    model = decoder(anchor["model"], Decoder(**ANCHORS["models"][anchor["model"]]))
    return estimate(model, Scheme.parse(anchor["scheme"]), target, Speed()).tokens_per_s or 0.0


def ratio(anchor: dict[str, Any]) -> float:
    """Estimated over measured."""
    return anchor_estimate(anchor) / anchor["tokens_per_s"]


def within(anchor: dict[str, Any]) -> bool:
    """Whether the estimate is close enough."""
    return abs(ratio(anchor) - 1) <= TOLERANCE


def anchors_table() -> Iterator[str]:
    """Measurement beside estimate, all of them."""
    met = sum(within(anchor) for anchor in ANCHORS["anchors"])
    yield f'{met} of {len(ANCHORS["anchors"])} within ±{TOLERANCE:.0%}; the others say why. "memory": the figure was not looked up.'
    yield ""
    yield "| device | model | scheme | measured tokens/s | estimate | ratio | source |"
    yield "|---|---|---|--:|--:|--:|---|"
    for anchor in ANCHORS["anchors"]:
        said = anchor["source"] + ("" if anchor["status"] == "read" else f" ({anchor['status']})")
        said += f"; **outside**: {anchor['why']}" if "why" in anchor else ""
        numbers = f"{anchor['tokens_per_s']:g} | {anchor_estimate(anchor):.3g} | {ratio(anchor):.2f}"
        yield f"| {anchor['device']} | {anchor['model']} | {anchor['scheme']} | {numbers} | {said} |"


def matrix_table() -> Iterator[str]:
    """One row per device, one column per model."""
    targets = list(REGISTRY.targets.values())
    yield "| device | " + " | ".join(f"{model.source} ({model.task})" for model in SIX) + " |"
    yield "|---" * (len(SIX) + 1) + "|"
    columns = [_column(model) for model in SIX]
    for index, target in enumerate(targets):
        yield f"| {target.name} | " + " | ".join(column[index] for column in columns) + " |"


def _column(model: ModelProfile) -> list[str]:
    targets = list(REGISTRY.targets.values())
    found = recommend(model, targets, Goals(), installed(HERE_INSTALLED), registry=REGISTRY)
    return [_cell(row, "tok/s" if model.task == "llm" else "ms") for row in rows(found, targets, REGISTRY)]


def _cell(row: tuple[str, ...], unit: str) -> str:
    _, method, scheme, finisher, size, _, speed, _, fits = row
    if method == "–":
        return "–"
    parts = [scheme, finisher.replace(" (missing)", "\\*"), size]
    if fits == "no":
        return " · ".join([*parts, "**too large**"])
    return " · ".join([*parts, *([f"{speed} {unit}"] if speed != "–" else [])])


def document(text: str) -> str:
    """`text` with its computed parts replaced."""
    for name, lines in (("anchors", anchors_table()), ("matrix", matrix_table())):
        mark = f"<!-- written by tests/routing_page.py: {name} -->"
        table = "\n".join(lines)
        text = re.sub(f"{re.escape(mark)}.*?<!-- end -->", lambda _, t=f"{mark}\n\n{table}\n\n<!-- end -->": t, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
