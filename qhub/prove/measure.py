"""`qhub eval`: the figures of one model folder, float or quantized by anybody, on a text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from qhub.events import Events
from qhub.prove.assemble import drop_pct
from qhub.prove.evaluate import Evaluation, Setting
from qhub.quantize.layouts.reader import open_weights
from qhub.skeleton import FloatWeights
from qhub.tokens import load_tokenizer, read_windows
from qhub.types import Calibration, as_json


def measure(folder: Path, source: Path | None, data: Calibration, events: Events) -> dict[str, Any]:
    """Perplexity and next-token accuracy of `folder`; divergence from the float model in `source` where there is one."""
    ids = torch.from_numpy(read_windows(load_tokenizer(folder), Path(data.data), data.samples, data.seq_len, all_there_is=True).ids)
    found: dict[str, Any] = {
        "model": str(folder),
        "data": data.data,
        "windows": len(ids),
        "seq_len": data.seq_len,
        "stride": data.seq_len - 1,
        "metric": "next_token_accuracy",
    }
    weights = open_weights(folder)
    with tempfile.TemporaryDirectory(prefix="qhub-eval-") as work:
        setting = Setting(Path(work))
        if isinstance(weights, FloatWeights) or source is None:
            return {**found, **as_json(Evaluation(weights, ids, setting, events).float_figures())}
        evaluation = Evaluation(FloatWeights(source), ids, setting, events)
        reference, figures = evaluation.float_figures(), evaluation.compare(weights, "quantized")
    drop = drop_pct(reference.accuracy, figures.accuracy)
    return {**found, **as_json(figures), "drop_pct": drop, "float": {"accuracy": reference.accuracy, "perplexity": reference.perplexity}}
