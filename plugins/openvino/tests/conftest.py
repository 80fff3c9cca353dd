"""What the tests share: caches of their own, and tiny models, quantized and exported, each once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from qhub_openvino.plugin import OpenVinoExporter, OpenVinoRuntime
from tiny_models import quantize, tiny_model

from qhub import OpenOptions, QuantizedModel, Quantizer, Recipe, quantize_rtn

RECIPE = Recipe("tiny", "tiny", "", "host", "nearest", "w4a16-g32-asym")


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


@dataclass(frozen=True)
class Exported:
    """Folders of a QuantizedModel and of what was made of it."""

    quantized: Path
    artifact: Path


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """The user's caches are not touched by tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def export():
    """QuantizedModel's folder, empty folder → the Artifact that the exporter writes there."""

    def work(quantized, out):
        return OpenVinoExporter().export(QuantizedModel(quantized, "weights", "w4a16-g32-asym", "nearest"), out, RECIPE)

    return work


@pytest.fixture(scope="session")
def exported(tmp_path_factory, export):
    """family, scheme, … → a tiny model as an OpenVINO folder, made once; tests must not write into it."""
    made = {}

    def make(family, scheme="w4a16-g32-asym", *, dtype="float32", config=None, **overrides):
        key = json.dumps([family, scheme, dtype, config, overrides])
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            quantize(tiny_model(family, getattr(torch, dtype)), folder, Nearest(), scheme, overrides=overrides)
            path = folder / "model" / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
            (folder / "artifact").mkdir()
            export(folder / "model", folder / "artifact")
            made[key] = Exported(folder / "model", folder / "artifact")
        return made[key]

    return make


@pytest.fixture(scope="session")
def opened():
    """artifact → a session, exact unless asked otherwise."""

    def work(artifact, *, exact=True, threads=1):
        return OpenVinoRuntime().open(artifact, OpenOptions(threads=threads, exact=exact))

    return work
