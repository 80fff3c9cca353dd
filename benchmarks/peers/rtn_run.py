"""Plain round to nearest as a float32 folder: the baseline that every method has to beat.

    python rtn_run.py MODEL OUT --bits 4 --group-size 128

Minimum and maximum of each group of inputs, the range always containing zero; float32 scales.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch
from common import read_folder, write_float_folder


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool) -> torch.Tensor:
    """weight (N, K) of any float type, not modified. Returns it quantized and restored, (N, K) float32."""
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, top)
    restored: torch.Tensor = (codes - zero) * scale
    return restored.reshape(weight.shape)


def is_quantized(name: str, ignore: Collection[str]) -> bool:
    """True for the decoder blocks' projections, false for norms, embeddings, the head, and what is ignored."""
    return name.endswith("_proj.weight") and not any(part in name for part in ignore)


def main() -> None:
    """Read the arguments, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--ignore", nargs="*", default=(), help="part of a layer's name, e.g. down_proj: left float")
    args = parser.parse_args()
    tensors = read_folder(args.model)
    for name in filter(lambda name: is_quantized(name, args.ignore), tensors):
        tensors[name] = round_to_nearest(tensors[name], args.bits, args.group_size, symmetric=args.symmetric)
    write_float_folder(args.model, tensors, args.out)


if __name__ == "__main__":
    main()
