"""From a QuantizedModel of a language model to a folder that OpenVINO opens: openvino_model.xml and .bin, config and tokenizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from qhub import DecoderFiles, QhubError, Unsupported, open_decoder, read_json
from qhub_openvino.constants import Constants
from qhub_openvino.decoder import DecoderIR
from qhub_openvino.schemes import ENGINE, why_not
from qhub_openvino.vendor import ov

FORMAT = "openvino"
MODEL, DATA = "openvino_model.xml", "openvino_model.bin"
FACTS, LAYERS = "qhub", "layers"  # rt_info: {layer: [scheme, N, K]}
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json")


def export_decoder(model: Path, out: Path) -> None:
    """Write the QuantizedModel in `model` into the empty directory `out`; memory holds one layer at a time.

    :raises Unsupported: when the family or a scheme is not carried; nothing is written then.
    """
    files = open_decoder(model, ENGINE)
    _check(files)
    with Constants(out) as constants:
        try:
            built = DecoderIR(constants, files).build()
        except (ValueError, IndexError, RuntimeError) as error:
            raise QhubError(f"`{model}` does not fit its config.json: {_first_line(error)}", hint="quantize the model again") from error
        layers = {name: [str(scheme), *files.shape(name)] for name, scheme in files.schemes.items()}
        built.set_rt_info(json.dumps(layers, sort_keys=True), [FACTS, LAYERS])
        name_nodes(built)
        ov.save_model(built, out / MODEL, compress_to_fp16=False)
        del built
    config = read_json(model / "config.json")
    _write_json(out / "config.json", {**config, "quantization_config": {"quant_method": FORMAT}})
    for path in sorted({path for pattern in _COPIED for path in model.glob(pattern)}):
        shutil.copyfile(path, out / path.name)
    if importlib.util.find_spec("openvino_tokenizers") and (out / "tokenizer.json").exists():
        _convert_tokenizer(out)


def name_nodes(model: ov.Model) -> None:
    """Nodes that have no name of ours are numbered by their place: OpenVINO counts all that the process ever made."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}.{index}")


def _check(files: DecoderFiles) -> None:
    for name, scheme in files.schemes.items():
        reason = why_not(scheme)
        if reason is not None:
            raise Unsupported(f"{reason}: layer `{name}`", hint="`--plugin hf` carries it")


def _convert_tokenizer(out: Path) -> None:
    """The tokenizer as IR, for openvino-genai."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    parts = convert_tokenizer(AutoTokenizer.from_pretrained(out), with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(part, out / f"openvino_{name}.xml")


def _first_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - JSON
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
