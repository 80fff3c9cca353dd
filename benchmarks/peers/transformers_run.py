"""Prompt and generation speed of a float model in transformers, as one JSON line.

    python transformers_run.py HF_FOLDER --threads 2 --prompt 512 --generate 128 --repeat 1

The weights stay in the dtype they are stored in.
"""

from __future__ import annotations

import time

import torch
import transformers
from timing import Run, Timing, parse_timing, print_timing


def load(asked: Timing) -> Run:
    """The model, in this process."""
    torch.set_num_threads(asked.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto").eval()

    @torch.inference_mode()
    def run(prompt: int, generate: int) -> tuple[float, float]:
        ids = torch.randint(3, model.config.vocab_size, (1, prompt))
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(generate - 1):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return first - start, (time.perf_counter() - first) / max(generate - 1, 1)

    return run


if __name__ == "__main__":
    timing = parse_timing(__doc__)
    print_timing(timing, lambda: load(timing), {"tool": "transformers", "version": transformers.__version__})
