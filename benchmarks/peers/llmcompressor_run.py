"""Quantize a model with llm-compressor (0.14) and say how long it took.

    python llmcompressor_run.py MODEL TOKENS.npy OUT --method gptq --bits 4 --group-size 128

Variants: `mse` and `imatrix` choose the weight range by searching (the default takes minimum and maximum);
for AWQ also `duo-both`, which searches with and without duo scaling.
GPTQ's activation order is the tool's default, "static": by importance, groups fixed, no `g_idx` (this version has no other
that needs one). A group size of -1 is one scale per output.
"""
# ruff: noqa: E402, I001 - stdout is taken before the tool is imported, since that prints already

from common import result_stream

RESULTS = result_stream()

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import MODEL_DTYPES, Job, Result, empty_folder, largest_difference, parse_job, print_result
from common import read_folder, write_float_folder
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping, default_mappings
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {"mse": "memoryless_mse", "imatrix": "imatrix_mse"}


def allow_cpu() -> None:
    """Make pinning memory do nothing: AWQ asks for it even where there is no accelerator, and fails."""
    IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)


def recipe(job: Job) -> list[Modifier]:
    """The modifiers that do the job."""
    weights: dict[str, Any] = {"num_bits": job.bits, "type": "int", "symmetric": job.symmetric}
    weights |= {"strategy": "channel"} if job.group_size < 0 else {"strategy": "group", "group_size": job.group_size}
    if job.variant in OBSERVERS:
        weights["observer"] = OBSERVERS[job.variant]
    target = {
        "config_groups": {"weights": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *(f"re:.*{part}.*" for part in job.ignore)],
    }
    if job.method == "gptq":
        return [GPTQModifier(**target)]
    if job.method == "rtn":
        return [QuantizationModifier(**target)]
    scaling = AWQModifier(mappings=awq_mappings(job), duo_scaling="both" if job.variant == "duo-both" else True)
    return [scaling, QuantizationModifier(**target)]


def awq_mappings(job: Job) -> list[AWQMapping] | None:
    """None for the tool's own choice; where layers are ignored, a Llama's mappings without theirs (else it fails)."""
    if not job.ignore:
        return None
    return [mapping for mapping in default_mappings if not any(part in layer for part in job.ignore for layer in mapping.balance_layers)]


def quantize(model: torch.nn.Module, job: Job) -> None:
    """Run the recipe on exactly the given tokens, in their order; rounding to nearest looks at none."""
    if job.method == "rtn":
        oneshot(model=model, recipe=recipe(job))
        return
    samples = job.samples()
    rows = {"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe(job),
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
        shuffle_calibration_samples=False,
    )


def module_scheme(config: QuantizationConfig) -> QuantizationScheme:
    """The scheme of the quantized layers: a recipe of ours has one for all."""
    (scheme,) = config.config_groups.values()
    return scheme


def dequantize(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a compressed folder with every layer's `weight` restored, computed in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = module_scheme(QuantizationConfig.model_validate(config))
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = read_folder(folder)
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        prefix = name + "."
        state = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        state["weight_scale"] = state["weight_scale"].float()
        tensors[prefix + "weight"] = compressor.decompress(state, scheme)["weight"]
    return tensors


def export_dequantized(job: Job, out: Path) -> dict[str, float]:
    """Write the float32 folder, and compare it with the compressed one as transformers reads that."""
    write_float_folder(job.model, dequantize(job.out), out)
    own = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return largest_difference(own, ours, job.samples()[0])


def main() -> None:
    """Read the arguments, do the job, print the result."""
    job = parse_job(__doc__, ["gptq", "awq", "rtn"], [*OBSERVERS, "duo-both"])
    result = Result()
    allow_cpu()
    with result.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=MODEL_DTYPES[job.dtype])
    with result.stage("quantize"):
        quantize(model, job)
    with result.stage("save"):
        model.save_pretrained(empty_folder(job.out), save_compressed=True)
        AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)
    result.note_peak_rss()
    if job.dequantized is not None:
        del model
        result.facts |= export_dequantized(job, job.dequantized)
    print_result(RESULTS, ("llm-compressor", version("llmcompressor")), job, result)


if __name__ == "__main__":
    main()
