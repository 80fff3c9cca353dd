"""`python -m qhub_demo.generate RUN_DIR`: what the quantized demo model of a run writes when it continues some Python."""

from __future__ import annotations

import sys
from pathlib import Path

PROMPTS = ("def read_file(path):", "class Queue:\n    def __init__(self")
NEW_TOKENS = 60


def main(arguments: list[str]) -> int:
    """Print greedy continuations of `PROMPTS` by the QuantizedModel in a run directory, opened by plain transformers."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "quantized").is_dir():
        print("usage: python -m qhub_demo.generate RUN_DIR", file=sys.stderr)
        return 2
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(arguments[0]) / "quantized"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.15, pad_token_id=1)
        print(f"\n--- the quantized model continues {prompt.splitlines()[0]!r}")
        print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
