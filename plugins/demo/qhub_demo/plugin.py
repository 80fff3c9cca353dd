"""The models that come with this plugin, as qhub finds them."""

from __future__ import annotations

from pathlib import Path

from qhub import ModelSource, hookimpl

DATA = Path(__file__).parent / "data"


@hookimpl
def qhub_models() -> list[ModelSource]:
    """`demo:llm`: a Llama-architecture language model of Python source code."""
    llm = DATA / "llm"
    return [
        ModelSource(
            name="demo:llm",
            path=llm,
            summary="Llama, 3.7 M parameters, trained on the Python standard library",
            calibration=llm / "calibration.txt",
            evaluation=llm / "heldout.txt",
        )
    ]
