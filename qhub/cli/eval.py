"""`qhub eval`: measure an artifact on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from qhub.cli import App
from qhub.units import human_bytes


@click.command(name="eval")
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--data", metavar="DATA", help="Text to measure on: .txt, .jsonl, .parquet or demo:llm; default: what the run used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def evaluate(app: App, artifact: Path, data: str | None, *, as_json: bool) -> None:
    """Measure ARTIFACT: perplexity and next-token accuracy, and what else its kind allows."""
    from qhub import pipeline
    from qhub.events import Events

    found = pipeline.evaluate(artifact, app.plugins, Events(listener=app.output.progress), data)
    if as_json:
        app.output.json(found)
    else:
        app.output.table(("", str(artifact)), tuple(_rows(found)), right=(str(artifact),))


#: Facts whose name alone does not say what they are.
_NAMES = {
    "kl": "mean KL",
    "top1_agreement": "top-1 agreement",
    "drop_pct": "accuracy drop",
    "seq_len": "tokens per window",
}
_UNSAID = ("metric", "model")  # the accuracy's name, and the table's title


def _rows(found: Mapping[str, Any], metric: str = "") -> Iterator[tuple[str, str]]:
    metric = str(found.get("metric", metric)).replace("_", " ").replace("next token", "next-token")
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", text) for inner, text in _rows(value, metric))
        elif name == "accuracy":
            yield metric, _worded(name, value)
        elif name not in _UNSAID:
            yield _NAMES.get(name, name.replace("_", " ")), _worded(name, value)


def _worded(name: str, value: Any) -> str:  # noqa: ANN401 - a JSON value
    if value is None:
        return "–"
    if name.endswith("bytes"):
        return human_bytes(value)
    if name.endswith(("accuracy", "agreement")):
        return f"{100 * value:.2f} %"
    if name.endswith("pct"):
        return f"{value:.2f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
