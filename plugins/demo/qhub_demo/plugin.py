"""The models that come with this plugin, as qhub finds them."""

from __future__ import annotations

from pathlib import Path

from qhub import ModelSource, hookimpl

DATA = Path(__file__).parent / "data"


@hookimpl
def qhub_models() -> list[ModelSource]:
    """`demo:llm`, `demo:vision` and `demo:text`: a language model, an image model and a text classifier, each with its data."""
    return [
        _source("llm", "txt", "Llama, 3.7 M parameters, trained on the Python standard library"),
        _source("vision", "npz", "ResNet, 82 thousand parameters, tells ten shapes apart in drawn pictures"),
        _source("text", "jsonl", "BERT, 0.2 M parameters, tells code, comments, docstrings and messages of Python modules apart"),
    ]


def _source(name: str, suffix: str, summary: str) -> ModelSource:
    folder = DATA / name
    return ModelSource(
        name=f"demo:{name}",
        path=folder,
        summary=summary,
        calibration=folder / f"calibration.{suffix}",
        evaluation=folder / f"heldout.{suffix}",
    )
