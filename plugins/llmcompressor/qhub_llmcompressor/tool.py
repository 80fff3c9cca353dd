"""Calls llm-compressor 0.14: a model folder and tokens in, its compressed folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qhub import ModelJob, Scheme

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

Modifiers = Callable[[Mapping[str, Any], ModelJob], "list[Modifier]"]


def run(job: ModelJob, modifiers: Modifiers) -> None:
    """Quantize the model of `job` with exactly its tokens, in their order, and save it compressed."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _allow_cpu()
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype="auto")
    calibration = {} if job.ids is None else _calibration(job.ids)
    tokenizer = AutoTokenizer.from_pretrained(job.source)  # else the tool looks for one by the model's name
    oneshot(model=model, processor=tokenizer, recipe=modifiers(targets(job.schemes), job), **calibration)
    model.save_pretrained(job.out, save_compressed=True)


def _calibration(ids: torch.Tensor) -> dict[str, Any]:
    from datasets import Dataset

    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    sizes = {"num_calibration_samples": len(ids), "max_seq_length": ids.shape[1]}
    return {"dataset": Dataset.from_dict(rows), "shuffle_calibration_samples": False, **sizes}


def targets(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Layers by scheme as the tool wants them: one group per scheme, each layer by its full name."""
    groups: dict[str, Any] = {}
    for index, scheme in enumerate(dict.fromkeys(schemes.values())):
        names = [name for name, chosen in schemes.items() if chosen == scheme]
        groups[f"group_{index}"] = {"targets": names, "weights": weights(scheme)}
    return {"config_groups": groups, "ignore": []}


def weights(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the words of compressed-tensors."""
    strategy = {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    return {"num_bits": scheme.weight_bits, "type": "int", "symmetric": scheme.symmetric, **strategy}


def awq_mappings(job: ModelJob) -> Any:  # noqa: ANN401 - the tool's mappings
    """None for the tool's own choice; where layers stay float, a Llama's mappings without theirs (else it fails)."""
    if not job.float_layers:
        return None
    from llmcompressor.modifiers.transform.awq.mappings import default_mappings

    parts = {name.rpartition(".")[2] for name in job.float_layers}
    return [mapping for mapping in default_mappings if not any(part in layer for part in parts for layer in mapping.balance_layers)]


def _allow_cpu() -> None:
    """Make pinning memory do nothing where there is no accelerator: AWQ asks for it there too, and fails."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)
