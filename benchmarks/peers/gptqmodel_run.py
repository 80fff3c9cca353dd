"""Quantize a model with GPTQModel (7.6) and say how long it took.

    python gptqmodel_run.py MODEL TOKENS.npy OUT --method gptq --bits 4 --group-size 128

GPTQ's default here is the tool's own: `act_group_aware`, no `desc_act`, minimum and maximum as range.
Variants of GPTQ: `mse` searches the range (the tool's `mse=2.4`), `desc-act` orders single inputs by importance
(its result needs a `g_idx` at run time), `desc-act-mse` does both.
"""
# ruff: noqa: E402, I001 - what the tool reads, and the stdout it prints to, is set before it is imported

import os

from common import result_stream

RESULTS = result_stream()
# It needs at least two workers, but by itself takes half of the cores and fails where there are two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))

from importlib.metadata import version
from pathlib import Path

import torch
from common import MODEL_DTYPES, Job, Result, empty_folder, largest_difference, parse_job, print_result
from common import read_folder, write_float_folder
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from transformers import AutoModelForCausalLM

VARIANTS = {"mse": {"mse": 2.4}, "desc-act": {"desc_act": True}, "desc-act-mse": {"desc_act": True, "mse": 2.4}}
BACKENDS = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}


def configuration(job: Job) -> QuantizeConfig:
    """The tool's configuration for the job."""
    options: dict[str, object] = {"bits": job.bits, "group_size": job.group_size, "sym": job.symmetric}
    options |= VARIANTS.get(job.variant, {})
    if job.method == "awq":
        options |= {"method": METHOD.AWQ, "format": FORMAT.GEMM}
    if job.ignore:
        options["dynamic"] = {f"-:.*{part}.*": {} for part in job.ignore}
    return QuantizeConfig(device="cpu", **options)


def quantize(model: GPTQModel, job: Job) -> None:
    """Run on exactly the given tokens, in their order."""
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.samples().tolist()]
    model.quantize(samples, batch_size=1, calibration_sort=None, backend=BACKENDS[job.method])


def load_packed(job: Job) -> torch.nn.Module:
    """The tool's result on a CPU, computing in float32 (AWQ: float16) with the scales as in its file.

    Loading would round the float16 scales to bfloat16 if left to choose.
    """
    loaded = GPTQModel.load(str(job.out), device="cpu", backend=BACKENDS[job.method], dtype=torch.float16)
    return loaded.model.float().eval()


def restored_weight(layer: BaseQuantLinear) -> torch.Tensor:
    """The weight (N, K) float32 of a packed layer whose scales are float32."""
    if layer.QUANT_TYPE.startswith("awq"):
        return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).T
    return layer.dequantize_weight().T


@torch.inference_mode()
def dequantize(job: Job) -> dict[str, torch.Tensor]:
    """The tensors of the packed folder with every layer's `weight` restored, computed in float32."""
    tensors = read_folder(job.out)
    for name, layer in load_packed(job).named_modules():
        if isinstance(layer, BaseQuantLinear):
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name + ".")}
            tensors[name + ".weight"] = restored_weight(layer)
    return tensors


def export_dequantized(job: Job, out: Path) -> dict[str, float]:
    """Write the float32 folder, and compare it with the packed one as the tool runs that."""
    write_float_folder(job.model, dequantize(job), out)
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return largest_difference(load_packed(job), ours, job.samples()[0])


def main() -> None:
    """Read the arguments, do the job, print the result."""
    job = parse_job(__doc__, ["gptq", "awq"], list(VARIANTS))
    result = Result()
    with result.stage("load"):
        model = GPTQModel.load(str(job.model), configuration(job), dtype=MODEL_DTYPES[job.dtype])
    with result.stage("quantize"):
        quantize(model, job)
    with result.stage("save"):
        model.save(str(empty_folder(job.out)))
    result.note_peak_rss()
    if job.dequantized is not None:
        del model
        result.facts |= export_dequantized(job, job.dequantized)
    print_result(RESULTS, ("gptqmodel", version("gptqmodel")), job, result)


if __name__ == "__main__":
    main()
