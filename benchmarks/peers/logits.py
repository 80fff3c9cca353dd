"""A quantized folder's logits as another tool computes them, in float32, as a .npy file.

    python logits.py FOLDER TOKENS.npy OUT.npy --tool gptqmodel|transformers

tokens int64 (samples, length); out float32 (length, vocab) of the first sample. With `gptqmodel` the weights are restored by
its own kernel from scales in fp16, as the file has them; with `transformers` by whatever it finds installed.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))

import argparse
import json
from pathlib import Path

import numpy as np
import torch


def by_gptqmodel(folder: Path) -> torch.nn.Module:
    """GPTQModel's own loader with its plain torch kernel."""
    from gptqmodel import BACKEND, GPTQModel

    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    backend = BACKEND.AWQ_TORCH if section["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model.float().eval()


def by_transformers(folder: Path) -> torch.nn.Module:
    """`from_pretrained`, nothing more."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TOOLS = {"gptqmodel": by_gptqmodel, "transformers": by_transformers}


def main() -> None:
    """Read the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample = torch.from_numpy(np.load(args.tokens))[:1]
    with torch.inference_mode():
        np.save(args.out, TOOLS[args.tool](args.folder)(input_ids=sample).logits[0].float().numpy())


if __name__ == "__main__":
    main()
