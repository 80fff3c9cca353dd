"""What the tests share: tiny models, quantized and exported, each once."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from qhub_onnxruntime.plugin import OnnxExporter, OnnxRuntime, QdqExporter
from tiny_models import FAMILIES, quantize, tiny_model, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from qhub import OpenOptions, QuantizedModel, Quantizer, Recipe, quantize_rtn

EXPORTERS = (OnnxExporter(), QdqExporter())
RECIPE = Recipe("tiny", "tiny", "", "host", "nearest", "w4a16-g32-asym")
_FOLDER = Path(tempfile.mkdtemp(prefix="qhub-tiny-onnx-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


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


def exported(family, scheme, exporter=EXPORTERS[0], *, dtype="float32", heads=None, config=None, **overrides):
    """A tiny model of `family` as an ONNX folder; tests must not write into it."""
    key = json.dumps([family, scheme, dtype, heads, config, overrides])
    quantized = _quantized(key)
    return Exported(quantized, _artifact(quantized, exporter))


@functools.cache
def _quantized(key):
    family, scheme, dtype, heads, config, overrides = json.loads(key)
    out = Path(tempfile.mkdtemp(dir=_FOLDER))
    source = tiny_model(family, getattr(torch, dtype)) if heads is None else _model_of_heads(family, heads)
    quantize(source, out, Nearest(), scheme, overrides=overrides)
    if config:
        path = out / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return out / "model"


def _model_of_heads(family, heads):
    """A tiny model with heads of another size."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER))
    settings = {"model_type": family, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES[family]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**settings, "num_attention_heads": heads}), dtype=torch.float32)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@functools.cache
def _artifact(quantized, exporter):
    out = Path(tempfile.mkdtemp(dir=_FOLDER))
    exporter.export(QuantizedModel(quantized, "weights", "w4a16-g32-asym", "nearest"), out, RECIPE)
    return out


def opened(artifact, *, exact=True, threads=1):
    """A session."""
    return OnnxRuntime().open(artifact, OpenOptions(threads=threads, exact=exact))
