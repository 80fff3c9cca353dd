"""Train the demo language model: a small Llama on the Python standard library's own source files.

    python train_llm.py                      # writes ../qhub_demo/data/llm, the files that are shipped
    python train_llm.py --out /tmp/llm --steps 200

Needs torch, transformers, tokenizers and a C++ compiler (eager is several times slower than torch.compile here). No network.
The seed fixes the initial weights and the order of the data; sums over several threads are not ordered, so two runs
agree in quality, not bit for bit. An interrupted run continues from its last checkpoint (`--checkpoint FOLDER`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Split, joined, read_modules, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
SHIPPED = Path(__file__).resolve().parent.parent / "qhub_demo" / "data" / "llm"


@dataclass(frozen=True)
class Training:
    """What decides the result; the defaults are those of the shipped model."""

    vocab_size: int = 2048
    context_tokens: int = 512
    batch_windows: int = 4
    steps: int = 4500
    warmup_steps: int = 100
    decay_share: float = 0.4
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    # Three epochs hardly overfit (README.md), so nothing needs decay.
    weight_decay: float = 0.0
    calibration_bytes: int = 480_000
    heldout_bytes: int = 240_000
    seed: int = 20


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes."""

    library: Path
    out: Path
    checkpoint: Path


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, and runs of spaces (indentation) become single entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All documents as one row of ids, each between `<s>` and `</s>`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [BOS_ID, *encoding.ids, EOS_ID]
    return torch.tensor(ids)


def window_starts(token_count: int, training: Training) -> Tensor:
    """Start of every training window, (steps, batch_windows): each epoch cuts the row at another offset and shuffles."""
    generator = torch.Generator().manual_seed(training.seed)
    needed = training.steps * training.batch_windows
    epochs: list[Tensor] = []
    while sum(len(e) for e in epochs) < needed:
        offset = int(torch.randint(training.context_tokens, (1,), generator=generator))
        starts = torch.arange(offset, token_count - training.context_tokens, training.context_tokens)
        epochs.append(starts[torch.randperm(len(starts), generator=generator)])
    return torch.cat(epochs)[:needed].view(training.steps, training.batch_windows)


def batch_at(ids: Tensor, starts: Tensor, context_tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (batch, context_tokens) each; every input begins with `<s>`, as in evaluation."""
    targets = ids[starts[:, None] + torch.arange(context_tokens)]
    inputs = functional.pad(targets[:, :-1], (1, 0), value=BOS_ID)
    return inputs, targets


def build_model(training: Training) -> LlamaForCausalLM:
    """A Llama whose every projection has a multiple of 128 inputs and outputs."""
    torch.manual_seed(training.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=training.vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
    )
    for layer in model.model.layers:
        # Each block starts as the identity: a small model learns about twice as fast from there.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def build_optimizers(model: LlamaForCausalLM, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for the embedding and the norms' gains."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.get_input_embeddings().weight, *(p for p in model.parameters() if p.ndim == 1)]
    decay = training.weight_decay
    return [
        torch.optim.Muon(matrices, lr=training.matrix_rate, weight_decay=decay, momentum=0.95),
        torch.optim.AdamW(others, lr=training.other_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True),
    ]


def rate_share(step: int, training: Training) -> float:
    """Share of the peak rate: warm-up, constant, then linearly to zero over the last `decay_share` of the steps.

    Before the decay it does not depend on `steps`: a checkpoint from there continues to any later end.
    """
    warm = (step + 1) / training.warmup_steps
    left = (training.steps - step) / (training.steps * training.decay_share)
    return min(warm, left, 1.0)


class Trainer:
    """The loop: model, optimizer and step counter, which together are the checkpoint."""

    def __init__(self, training: Training, ids: Tensor, checkpoint: Path) -> None:
        self.training, self.ids, self.checkpoint = training, ids, checkpoint / "llm.pt"
        self.model = build_model(training)
        self.optimizers = build_optimizers(self.model, training)
        self.peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.starts = window_starts(len(ids), training)
        self.step = 0
        self.compiled_loss = torch.compile(self.loss)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, in bfloat16 up to the logits."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def advance(self) -> float:
        """One step of the optimizer; the loss before it."""
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_share(self.step, self.training)
        loss = self.compiled_loss(*batch_at(self.ids, self.starts[self.step], self.training.context_tokens))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def run(self) -> None:
        """To the last step, with a line every 50 steps and a checkpoint every 200."""
        began, total, since = time.monotonic(), 0.0, 0
        while self.step < self.training.steps:
            total, since = total + self.advance(), since + 1
            if self.step % 50 == 0:
                seconds = time.monotonic() - began
                print(f"step {self.step} loss {total / since:.4f} seconds {seconds:.0f}", flush=True)
                total, since = 0.0, 0
            if self.step % 200 == 0:
                self.save()

    def save(self) -> None:
        """Write the checkpoint beside its final name, then rename it into place."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        beside = self.checkpoint.with_suffix(".tmp")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}, beside)
        beside.replace(self.checkpoint)

    def restore(self) -> None:
        """Continue from the checkpoint where there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, windows: int = 60, window_tokens: int = 512) -> tuple[float, float]:
    """Perplexity and next-token accuracy on the first windows of running text, each beginning with `<s>`."""
    total_loss, hits, count = 0.0, 0, 0
    for chunk in ids.split(window_tokens - 1)[:windows]:
        inputs = functional.pad(chunk, (1, 0), value=BOS_ID)[None]
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        total_loss += float(functional.cross_entropy(logits, chunk, reduction="sum"))
        hits += int((logits.argmax(-1) == chunk).sum())
        count += len(chunk)
    return math.exp(total_loss / count), hits / count


def write_texts(parts: Split, out: Path) -> None:
    """The calibration and held-out texts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.txt").write_text(joined(parts.calibration), encoding="utf-8", newline="\n")
    (out / "heldout.txt").write_text(joined(parts.heldout), encoding="utf-8", newline="\n")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and the few settings that transformers' AutoTokenizer reads beside it."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(training: Training, places: Places) -> None:
    """Text, tokenizer, model, and the numbers for the README."""
    parts = split(
        read_modules(places.library),
        calibration_bytes=training.calibration_bytes,
        heldout_bytes=training.heldout_bytes,
    )
    texts = [m.text for m in parts.training]
    write_texts(parts, places.out)
    tokenizer = train_tokenizer(texts, training.vocab_size)
    write_tokenizer(tokenizer, places.out)
    ids = encode_documents(tokenizer, texts)
    trainer = Trainer(training, ids, places.checkpoint)
    trainer.restore()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    epochs = training.steps * training.batch_windows * training.context_tokens / len(ids)
    print(f"{len(texts)} modules, {len(ids)} tokens, {epochs:.1f} epochs, {parameters} parameters", flush=True)
    trainer.run()
    trainer.model.half().save_pretrained(places.out)
    report(trainer.model.float().eval(), tokenizer, parts)


def report(model: LlamaForCausalLM, tokenizer: Tokenizer, parts: Split) -> None:
    """Print how well the model, as saved, predicts the modules it has not seen."""
    for name, modules in (("calibration", parts.calibration), ("heldout", parts.heldout)):
        ids = torch.tensor(tokenizer.encode(joined(modules), add_special_tokens=False).ids)
        value, accuracy = perplexity(model, ids)
        print(f"{name} perplexity {value:.3f} next-token accuracy {accuracy:.4f}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(Training(steps=options.steps), Places(options.library, options.out, options.checkpoint))


if __name__ == "__main__":
    main()
