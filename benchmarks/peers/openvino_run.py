"""Prompt and generation speed of a GGUF file (or an OpenVINO folder) in OpenVINO GenAI, as one JSON line.

    OV/bin/python openvino_run.py MODEL --threads 2 --prompt 512 --generate 128 --repeat 1

GenAI's own settings otherwise. Every prompt is new random tokens, so that no cache of prefixes helps.
"""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from timing import Run, Timing, parse_timing, print_timing

VOCABULARY = 32000


def load(asked: Timing) -> Run:
    """The model on the CPU."""
    pipe = openvino_genai.LLMPipeline(asked.model, "CPU", INFERENCE_NUM_THREADS=asked.threads)

    def run(prompt: int, generate: int) -> tuple[float, float]:
        ids = np.random.default_rng().integers(3, VOCABULARY, (1, prompt), dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        found = pipe.generate(inputs, max_new_tokens=generate, ignore_eos=True, do_sample=False).perf_metrics
        return found.get_ttft().mean / 1000, found.get_tpot().mean / 1000

    return run


if __name__ == "__main__":
    timing = parse_timing(__doc__)
    print_timing(timing, lambda: load(timing), {"tool": "openvino-genai", "version": openvino_genai.__version__})
