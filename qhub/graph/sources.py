"""Where a float network comes from: a Hugging Face folder, a `.pt2` program, an `.onnx` file, or a function that makes a module.

What it takes is said by a sample of its inputs, as the preprocessor makes them; the batch varies, and with texts and sounds the length.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qhub.errors import DamagedModelError, QhubError, Unsupported, UsageError
from qhub.graph.torch_graph import TorchGraph, load_program, module_of
from qhub.graph.values import Batch, GraphInput

if TYPE_CHECKING:
    from qhub.interfaces import Graph

#: What the class of an architecture ends with → transformers' class for it, and the output that is taken.
_HEADS = {
    "ForImageClassification": ("AutoModelForImageClassification", "logits"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "logits"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "logits"),
    "ForAudioClassification": ("AutoModelForAudioClassification", "logits"),
    "ForImageClassificationWithTeacher": ("AutoModelForImageClassification", "logits"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "logits"),
}
_VARYING = ("input_ids", "attention_mask", "token_type_ids", "input_values")  # inputs whose length varies too
OUTPUT = "logits"
EMBEDDING = "sentence_embedding"


@dataclass(frozen=True)
class Source:
    """A network to open: `path` a folder or a file; `factory` is `module:function` for the user's own code, `path` then its weights."""

    path: Path
    factory: str | None = None
    trust_remote_code: bool = False


def open_graph(source: Source, sample: Batch) -> Graph:
    """The float network, simplified for running; `sample` is a batch of its inputs.

    :raises QhubError: when it is not there, damaged, or cannot be exported; it names what is in the way.
    """
    if source.factory is not None:
        return _exported(_made(source.factory, source.path), sample, (OUTPUT,), source.factory)
    if source.path.is_dir():
        model, output = _from_folder(source, tuple(sample))
        return _exported(model, sample, (output,), source.path.name)
    if source.path.suffix.lower() == ".pt2":
        return open_program(source.path)
    if source.path.suffix.lower() == ".onnx":
        from qhub.graph.onnx_graph import OnnxGraph

        return OnnxGraph.of(source.path)
    raise Unsupported(f"`{source.path}` is no network that is quantized here", hint="give a model folder, a .pt2 or an .onnx file")


def inputs_of(sample: Batch) -> tuple[GraphInput, ...]:
    """The inputs that a sample is an example of: any batch, and any length where texts or sounds are."""
    return tuple(
        GraphInput(name, (-1, *((-1,) if name in _VARYING else ()), *value.shape[2 if name in _VARYING else 1 :]), str(value.dtype))
        for name, value in sample.items()
    )


def _exported(model: nn.Module, sample: Batch, outputs: tuple[str, ...], name: str) -> TorchGraph:
    try:
        return TorchGraph.of(model, inputs_of(sample), outputs)
    except Exception as error:
        if os.environ.get("QHUB_TRACEBACK"):
            raise
        first = str(error).strip().partition("\n")[0]
        hint = "export it yourself with torch.export.save and give the .pt2 file, or give an .onnx file"
        raise Unsupported(f"`{name}` cannot be exported by torch.export: {type(error).__name__}: {first}", hint=hint) from error


def open_program(path: Path) -> TorchGraph:
    """A `.pt2` program that somebody saved: its inputs are those of the program.

    :raises DamagedModelError: when it cannot be read.
    """
    try:
        program = load_program(path)
    except QhubError:
        raise
    except Exception as error:  # noqa: BLE001 - what a damaged archive raises is not defined
        first = str(error).strip().partition("\n")[0]
        raise DamagedModelError(f"`{path}` cannot be opened: {first}", hint="save it again with torch.export.save") from None
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = tuple(_described(nodes[name]) for name in program.graph_signature.user_inputs if isinstance(name, str))
    count = len(program.graph_signature.user_outputs)
    return TorchGraph.simplified(module_of(program), inputs, tuple(f"output_{index}" if index else OUTPUT for index in range(count)))


def _described(node: Any) -> GraphInput:  # noqa: ANN401 - a placeholder
    value = node.meta["val"]
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return GraphInput(node.name, shape, str(value.dtype).removeprefix("torch."))


def _made(factory: str, weights: Path) -> nn.Module:
    """The module that the user's function makes, with the weights put into it.

    :raises UsageError: when there is no such function. :raises QhubError: when the weights do not fit.
    """
    module_name, _, function = factory.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"`{factory}` cannot be imported: {error}", hint="run it from where `import` finds the module") from None
    finally:
        sys.path.pop(0)
    model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"`{factory}` returns `{type(model).__name__}`, not an nn.Module", hint="name a function that returns one")
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:  # noqa: BLE001 - torch and safetensors raise what they like
        first = " ".join(str(error).split())[:200]
        raise QhubError(
            f"the weights `{weights}` do not fit `{factory}`: {first}", hint="save them with safetensors from that module"
        ) from None
    return model.eval()


def _from_folder(source: Source, names: Sequence[str]) -> tuple[nn.Module, str]:
    """The model of a Hugging Face folder, and what its only output is."""
    import transformers

    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    architecture = str((config.get("architectures") or ["unknown"])[0])
    automatic, output = _head(architecture)
    options = {"local_files_only": True, "trust_remote_code": source.trust_remote_code, "dtype": torch.float32}
    try:
        model = getattr(transformers, automatic).from_pretrained(source.path, **options)
    except Exception as error:
        if os.environ.get("QHUB_TRACEBACK"):
            raise
        first = str(error).strip().partition("\n")[0]
        raise QhubError(f"transformers does not open `{source.path}`: {first}", hint="check that the folder is complete") from error
    pick = _logits if output == OUTPUT else _first if _pooling(source.path) == "cls" else _mean
    return _by_position(model.eval(), names, pick), output


def _head(architecture: str) -> tuple[str, str]:
    """transformers' class for an architecture, and what its only output is; a class without a head gives hidden states.

    :raises Unsupported: when its head gives something else.
    """
    found = next((head for ending, head in _HEADS.items() if architecture.endswith(ending)), None)
    if found is None and "For" in architecture:
        known = ", ".join(f"…{ending}" for ending in _HEADS)
        hint = f"export it with torch.export.save and give the .pt2 file; folders of these are opened: {known}"
        raise Unsupported(f"what a `{architecture}` gives is not known here", hint=hint)
    return found or ("AutoModel", EMBEDDING)


def _by_position(model: nn.Module, names: Sequence[str], pick: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]) -> nn.Module:
    """The same model, taking its inputs by position (they keep their names in the program) and giving what `pick` takes of its output."""
    original = model.forward

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, inputs, strict=True))
        return pick(original(**given), given)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward
    return model


def _logits(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ANN401 - a ModelOutput
    logits: torch.Tensor = output.logits
    return logits


def _mean(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ANN401 - a ModelOutput
    """Hidden states (B, T, H) averaged over the tokens that are there (or over the picture), of length 1."""
    hidden: torch.Tensor = output.last_hidden_state
    if hidden.dim() == 4:
        return nn.functional.normalize(hidden.flatten(2).mean(2), dim=-1)
    mask = inputs.get("attention_mask")
    weight = torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9), dim=-1)


def _first(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ANN401 - a ModelOutput
    """The hidden state of the first token, of length 1."""
    return nn.functional.normalize(output.last_hidden_state[:, 0], dim=-1)


def _pooling(folder: Path) -> str:
    """Which pooling a sentence-transformers folder asks for; mean where it says nothing."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    said: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return "cls" if said.get("pooling_mode_cls_token") else "mean"
