"""How much a quantized model lost: perplexity, next-token accuracy, divergence from the float model on the same tokens.

Both models run block by block, so memory is one block's weights and the hidden states of the evaluation windows. The
definitions are in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qhub.events import Events, Progress
from qhub.skeleton import Skeleton, Weights, batch_size, forward_dtype, run_block
from qhub.spool import Spool

_LOGITS_AT_ONCE = 1 << 25  # numbers in one piece of logits: 128 MB of float32


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; `kl` (nats per token) and `top1_agreement` are against the float model."""

    accuracy: float
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how the evaluation runs; `work` takes what does not fit `hidden_limit_bytes`."""

    work: Path
    device: str = "cpu"
    hidden_limit_bytes: int = 1 << 30
    trust_remote_code: bool = False


@dataclass
class _Sums:
    tokens: int = 0
    nll: float = 0.0
    hits: int = 0
    kl: float = 0.0
    agreed: int = 0

    def figures(self, *, compared: bool) -> Figures:
        count = max(self.tokens, 1)
        both = (self.kl / count, self.agreed / count) if compared else (None, None)
        return Figures(self.hits / count, math.exp(min(self.nll / count, 700.0)), *both)


class Evaluation:
    """The float model's hidden states on the evaluation windows, and the comparison of others with it."""

    def __init__(self, weights: Weights, ids: torch.Tensor, setting: Setting, events: Events) -> None:
        """Run the float model on ids (windows, seq_len) int64."""
        self.ids = ids
        self.setting = setting
        self.events = events
        self.batch = batch_size(len(ids), ids.shape[1])
        self.skeleton = self._skeleton(weights)
        self.reference = self._final_hidden(self.skeleton, "float")

    def float_figures(self) -> Figures:
        """The float model's own figures."""
        sums = _Sums()
        for ids, hidden, _ in self._pieces(self.reference, None):
            _count(sums, self.skeleton.logits(ids, hidden), None, ids)
        return sums.figures(compared=False)

    def compare(self, weights: Weights, name: str) -> Figures:
        """The figures of a model with the same outer tensors (embeddings, norm, head) and other blocks."""
        hidden = self._final_hidden(self._skeleton(weights), name)
        sums = _Sums()
        for ids, mine, expected in self._pieces(hidden, self.reference):
            assert expected is not None
            _count(sums, self.skeleton.logits(ids, mine), self.skeleton.logits(ids, expected), ids)
        hidden.close()
        return sums.figures(compared=True)

    def _skeleton(self, weights: Weights) -> Skeleton:
        skeleton = Skeleton(weights, device=self.setting.device, trust_remote_code=self.setting.trust_remote_code)
        hidden_size = int(skeleton.config.get_text_config().hidden_size)
        skeleton.dtype = forward_dtype(skeleton.model_dtype, hidden_size, self.setting.device)
        return skeleton

    @torch.no_grad()
    def _final_hidden(self, skeleton: Skeleton, name: str) -> Spool:
        """The hidden states after the last block, a batch per entry."""
        skeleton.learn_output_form(self.ids)
        stream = Spool(self.setting.work / f"evaluate-{name}.spool", self.setting.hidden_limit_bytes // 2)
        for start in range(0, len(self.ids), self.batch):
            hidden, calls = skeleton.embed(self.ids[start : start + self.batch])
            stream.append(hidden)
        progress = Progress(self.events, f"evaluate {name}", len(skeleton.block_names))
        for index, block_name in enumerate(skeleton.block_names):
            with skeleton.block(index) as module:
                for batch in range(len(stream)):
                    stream[batch] = run_block(module, stream[batch], calls[index])
            progress.block(index, block_name)
        return stream

    def _pieces(self, stream: Spool, other: Spool | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(ids (1, t + 1), hidden (1, t + 1, H), the other's hidden) of single windows, cut so that logits stay small."""
        vocabulary = int(self.skeleton.config.get_text_config().vocab_size)
        length = max(2, _LOGITS_AT_ONCE // vocabulary)
        for batch in range(len(stream)):
            hidden, expected = stream[batch], None if other is None else other[batch]
            for row in range(len(hidden)):
                ids = self.ids[batch * self.batch + row]
                for start in range(0, len(ids) - 1, length - 1):
                    cut = slice(start, start + length)
                    yield ids[cut].unsqueeze(0), hidden[row : row + 1, cut], None if expected is None else expected[row : row + 1, cut]


def _count(sums: _Sums, logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> None:
    """Add the predictions of all but the last position: logits (1, t, V) float32, ids (1, t)."""
    predicted = torch.log_softmax(logits[0, :-1], -1)
    wanted = ids[0, 1:].to(predicted.device)
    sums.tokens += len(wanted)
    sums.nll -= float(predicted.gather(1, wanted.unsqueeze(1)).sum())
    best = predicted.argmax(-1)
    sums.hits += int((best == wanted).sum())
    if reference is not None:
        expected = torch.log_softmax(reference[0, :-1], -1)
        sums.kl += float((expected.exp() * (expected - predicted)).sum())
        sums.agreed += int((expected.argmax(-1) == best).sum())
