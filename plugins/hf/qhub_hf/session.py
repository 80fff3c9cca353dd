"""A model opened by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qhub import OpenOptions, quiet_libraries


class HfSession:
    """`AutoModelForCausalLM.from_pretrained(path)`, nothing more."""

    def __init__(self, path: Path, options: OpenOptions = OpenOptions()) -> None:  # noqa: B008 - frozen
        from transformers import AutoModelForCausalLM

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        dtype = torch.float32 if options.exact else "auto"
        with quiet_libraries():
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()

    @torch.no_grad()
    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V)."""
        with quiet_libraries():
            output = self.model(torch.from_numpy(ids), use_cache=False)
        found: NDArray[np.float32] = output.logits.float().numpy()
        return found

    @torch.no_grad()
    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until_stop: bool = True,
    ) -> Iterator[int]:
        """Token ids that continue `ids`, one at a time; greedy at temperature 0."""
        generator = torch.Generator().manual_seed(seed)
        stop = self.model.generation_config.eos_token_id
        stops = set(stop if isinstance(stop, list) else [stop]) if until_stop else set()
        tokens, cache = torch.tensor([list(ids)]), None
        for _ in range(max_new_tokens):
            with quiet_libraries():
                output = self.model(tokens, past_key_values=cache, use_cache=True)
            cache, last = output.past_key_values, output.logits[0, -1].float()
            token = int(last.argmax()) if temperature <= 0 else _drawn(torch.softmax(last / temperature, -1), top_p, generator)
            if token in stops:
                return
            yield token
            tokens = torch.tensor([[token]])

    def close(self) -> None:
        """Give memory back."""
        del self.model


def _drawn(probabilities: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    """A token of the fewest most probable ones that have `top_p` together; probabilities (V) float32."""
    best, tokens = probabilities.sort(descending=True)
    best[best.cumsum(-1) - best >= top_p] = 0
    return int(tokens[best.multinomial(1, generator=generator)])
