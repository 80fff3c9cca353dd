"""Quantized folders' logits as another tool computes them, in float32, each as a .npy file.

    python logits.py TOKENS.npy FOLDER=OUT.npy ... --tool gptqmodel|transformers

tokens int64 (samples, length); out float32 (length, vocab) of the first sample; OUT.txt says why where a folder is refused.
With `gptqmodel` the weights are restored by its own code from scales in fp16, as the file has them, and multiplied in float32
(its AWQ kernel would do that in fp16); with `transformers` by whatever that finds installed (for GPTQ on a CPU a kernel of
GPTQModel that computes in bf16).
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))

import argparse
import json
from pathlib import Path

import numpy as np
import torch


def by_gptqmodel(folder: Path) -> torch.nn.Module:
    """GPTQModel's own loader with its plain torch kernel; AWQ layers with the weights that kernel would multiply with."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    backend = BACKEND.AWQ_TORCH if section["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model.float().eval()
    for name, layer in list(model.named_modules()) if section["quant_method"] == "awq" else ():
        if hasattr(layer, "qweight"):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), layer.bits, layer.group_size)
            linear.weight = torch.nn.Parameter(weight.T.contiguous())
            linear.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.float())
            model.set_submodule(name, linear)
    return model


def by_transformers(folder: Path) -> torch.nn.Module:
    """`from_pretrained`, nothing more."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TOOLS = {"gptqmodel": by_gptqmodel, "transformers": by_transformers}


def main() -> None:
    """Read the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folders", nargs="+", metavar="FOLDER=OUT.npy")
    parser.add_argument("--tool", choices=TOOLS, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample = torch.from_numpy(np.load(args.tokens))[:1]
    for folder, _, out in (pair.partition("=") for pair in args.folders):
        try:
            with torch.inference_mode():
                np.save(out, TOOLS[args.tool](Path(folder))(input_ids=sample).logits[0].float().numpy())
        except Exception as error:
            Path(out).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}".splitlines()[0], encoding="utf-8")


if __name__ == "__main__":
    main()
