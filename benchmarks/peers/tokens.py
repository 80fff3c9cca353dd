"""Calibration tokens as a .npy file, so that every tool is calibrated on exactly the same ones.

    python tokens.py MODEL TEXT OUT.npy --samples 64 --length 512

Also imported by `evaluate.py`: calibration and evaluation cut their windows in the same way.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer


def bos_windows(model: Path, text: str, samples: int, length: int) -> npt.NDArray[np.int64]:
    """The first `samples` windows of a text, (samples, length) int64: BOS and `length - 1` running tokens each.

    :raises ValueError: when the text is too short, naming how many tokens it has and how many are needed.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    running = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    needed = samples * (length - 1)
    if len(running) < needed:
        raise ValueError(f"the text has {len(running)} tokens, {samples} windows of {length} need {needed}")
    body = running[:needed].reshape(samples, length - 1)
    return np.concatenate([np.full((samples, 1), tokenizer.bos_token_id, dtype=np.int64), body], axis=1)


def main() -> None:
    """Read the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder, for its tokenizer")
    parser.add_argument("text", type=Path, help="plain text file, UTF-8")
    parser.add_argument("out", type=Path, help=".npy file to write, int64 (samples, length)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample, the BOS included")
    args = parser.parse_args()
    windows = bos_windows(args.model, args.text.read_text(encoding="utf-8"), args.samples, args.length)
    np.save(args.out, windows)
    print(f"{args.out}: {windows.shape[0]} x {windows.shape[1]} tokens")


if __name__ == "__main__":
    main()
