"""The common evaluator: plain float folders, plain transformers, float32, the same windows for all.

    python evaluate.py FLOAT_MODEL TEXT [NAME=FOLDER ...]

Prints one JSON line per model: the float model first, then each folder of dequantized weights
(`--dequantized` of the runners, or `rtn_run.py`). KL and agreement are against the float model.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokens import bos_windows
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass
class Sums:
    """Totals over predicted tokens; `row` turns them into means."""

    tokens: int = 0
    loss: float = 0.0
    correct: int = 0
    kl: float = 0.0
    agree: int = 0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one window. logits and reference (T, vocab) float32, targets (T,) int64; none is modified."""
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        top = logits.argmax(-1)
        self.tokens += len(targets)
        self.loss -= log_q.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
        self.correct += int((top == targets).sum())
        self.kl += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
        self.agree += int((top == reference.argmax(-1)).sum())

    def row(self) -> dict[str, float]:
        """The figures to report: KL in nats per token, the rest as the name says."""
        return {
            "perplexity": math.exp(self.loss / self.tokens),
            "accuracy": self.correct / self.tokens,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Windows:
    """What to evaluate on: BOS windows of a text, as (count, length) int64."""

    text: str
    count: int
    length: int

    def of(self, model: Path) -> torch.Tensor:
        """The windows in the tokens of `model`."""
        return torch.from_numpy(bos_windows(model, self.text, self.count, self.length))


def load_float32(folder: Path) -> PreTrainedModel:
    """The folder as a float32 model ready for inference, whatever dtype its files have."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def window_logits(model: PreTrainedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits of each window in turn, (length - 1, vocab) float32: the last position predicts nothing known."""
    for window in windows:
        yield model(window[None], use_cache=False).logits[0, :-1].float()


@torch.inference_mode()
def evaluate(float_folder: Path, folder: Path, windows: Windows) -> dict[str, float]:
    """Figures of one folder. The float model runs again beside it, so that no logits have to be kept."""
    tokens = windows.of(float_folder)
    reference, model = load_float32(float_folder), load_float32(folder)
    sums = Sums()
    pairs = zip(tokens, window_logits(model, tokens), window_logits(reference, tokens), strict=True)
    for window, logits, expected in pairs:
        sums.add(logits, expected, window[1:])
    return sums.row()


def named_folder(argument: str) -> tuple[str, Path]:
    """`NAME=FOLDER` split at the first `=`."""
    name, _, folder = argument.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"`{argument}`: expected NAME=FOLDER")
    return name, Path(folder)


def main() -> None:
    """Read the arguments, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("folders", type=named_folder, nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, the BOS included")
    args = parser.parse_args()
    windows = Windows(args.text.read_text(encoding="utf-8"), args.windows, args.length)
    for name, folder in [("float", args.float_model), *args.folders]:
        row = {"name": name, **evaluate(args.float_model, folder, windows)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
