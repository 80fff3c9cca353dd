"""From a QuantizedModel of a language model to a folder that ONNX Runtime opens: model.onnx, its data, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qhub import DecoderFiles, QhubError, Unsupported, open_decoder, read_json
from qhub_onnxruntime.decoder import DecoderGraph
from qhub_onnxruntime.genai import genai_config
from qhub_onnxruntime.graph import Graph
from qhub_onnxruntime.linear import Quantized
from qhub_onnxruntime.schemes import ENGINE, why_not, why_not_heads

FORMAT = "onnx"
LAYERS = "qhub.layers"  # metadata: {layer: [scheme, N, K]}
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json")


def export_decoder(model: Path, out: Path, quantized: Quantized) -> None:
    """Write the QuantizedModel in `model` into the empty directory `out`; memory holds one layer at a time.

    :raises Unsupported: when the family, a scheme or the size of heads is not carried; nothing is written then.
    """
    files = open_decoder(model, ENGINE)
    _check(files)
    with Graph(out) as graph:
        try:
            inputs, outputs = DecoderGraph(graph, files, quantized).build()
        except (ValueError, IndexError) as error:
            raise QhubError(f"`{model}` does not fit its config.json: {error}", hint="quantize the model again") from error
        layers = {name: [str(scheme), *files.shape(name)] for name, scheme in files.schemes.items()}
        graph.save(files.config.kind, inputs, outputs, {LAYERS: json.dumps(layers, sort_keys=True)})
    config = read_json(model / "config.json")
    _write_json(out / "config.json", {**config, "quantization_config": {"quant_method": FORMAT}})
    _write_json(out / "genai_config.json", genai_config(files.config, config))
    for path in sorted({path for pattern in _COPIED for path in model.glob(pattern)}):
        shutil.copyfile(path, out / path.name)


def _check(files: DecoderFiles) -> None:
    reasons = {f"{reason}: layer `{name}`" for name, scheme in files.schemes.items() if (reason := why_not(scheme)) is not None}
    reason = why_not_heads(files.config) or next(iter(sorted(reasons)), None)
    if reason is not None:
        raise Unsupported(reason, hint="`--plugin hf` carries it")


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - JSON
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
