"""Train the demo text model: a small BERT that tells code, comments, docstrings and messages of the standard library apart.

    python train_text.py                       # writes ../qhub_demo/data/text, the files that are shipped
    python train_text.py --out /tmp/text --epochs 1

Needs torch, transformers and tokenizers; no network. The texts are those of the Python that runs it. The seed fixes choice, order
and initial weights: on one thread of the same processor, with the same torch, a run repeats bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Module, read_modules, split
from lines import KINDS, Line, balanced, labelled
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

SHIPPED = Path(__file__).resolve().parent.parent / "qhub_demo" / "data" / "text"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 64


@dataclass(frozen=True)
class Training:
    """What decides the result; the defaults are those of the shipped model."""

    vocabulary: int = 1536
    epochs: int = 7
    epoch_lines: int = 28_000
    batch_lines: int = 64
    peak_rate: float = 2e-3
    weight_decay: float = 0.01
    calibration_lines: int = 256
    heldout_lines: int = 1_000
    text_bytes: int = 480_000  # of the modules that are held out, and of those for calibration
    seed: int = 20


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """WordPiece with case kept, cut and padded as BERT wants it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), min_frequency=2, show_progress=False)
    )
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int) -> BertForSequenceClassification:
    """Three layers of hidden size 64."""
    torch.manual_seed(seed)
    names = dict(enumerate(KINDS))
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=192,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.token_to_id("[PAD]"),
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )


def batches(tokenizer: Tokenizer, lines: list[Line], size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs (B, T) int64 and labels (B,), in order, padded to the longest."""
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        encoded = tokenizer.encode_batch([line.text for line in some])
        inputs = {"input_ids": torch.tensor([e.ids for e in encoded]), "attention_mask": torch.tensor([e.attention_mask for e in encoded])}
        yield inputs, torch.tensor([line.label for line in some])


def epoch_order(lines: list[Line], training: Training, epoch: int) -> list[Line]:
    """As many lines of every kind, rare ones repeated; batches of about the same length, in random order."""
    dice = random.Random(training.seed + epoch)
    each = training.epoch_lines // len(KINDS)
    chosen = [dice.choice(of) for of in _by_kind(lines) for _ in range(each)]
    dice.shuffle(chosen)
    chosen.sort(key=lambda line: len(line.text) // 8)
    size = training.batch_lines
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    dice.shuffle(groups)
    return [line for group in groups for line in group]


def _by_kind(lines: list[Line]) -> list[list[Line]]:
    return [[line for line in lines if line.label == label] for label in range(len(KINDS))]


def train(tokenizer: Tokenizer, lines: list[Line], training: Training) -> BertForSequenceClassification:
    """All epochs; the model after the last."""
    model = build_model(tokenizer, training.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.peak_rate, weight_decay=training.weight_decay)
    steps = training.epochs * -(-training.epoch_lines // training.batch_lines)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.peak_rate, total_steps=steps, pct_start=0.1)
    began = time.process_time()
    for epoch in range(training.epochs):
        losses = []
        for inputs, labels in batches(tokenizer, epoch_order(lines, training, epoch), training.batch_lines):
            loss = functional.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1} loss {sum(losses) / len(losses):.4f} CPU seconds {time.process_time() - began:.0f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, tokenizer: Tokenizer, lines: list[Line]) -> float:
    """Share of lines whose kind is the model's first choice."""
    hits = sum(int((model(**inputs).logits.argmax(-1) == labels).sum()) for inputs, labels in batches(tokenizer, lines, 100))
    return hits / len(lines)


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and the settings that transformers' AutoTokenizer reads beside it."""
    tokenizer.save(str(out / "tokenizer.json"))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS, "clean_up_tokenization_spaces": False}
    settings |= dict(zip(names, SPECIAL, strict=True))
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_lines(lines: list[Line], path: Path) -> None:
    """One JSON object a line: `text` and the name of its kind, `label`."""
    rows = (json.dumps({"text": line.text, "label": KINDS[line.label]}, ensure_ascii=False) for line in lines)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")


def sets(modules: list[Module], training: Training) -> tuple[list[Line], list[Line], list[Line]]:
    """Training, calibration and held-out lines: of different modules, and no line is in two of them."""
    parts = split(modules, calibration_bytes=training.text_bytes, heldout_bytes=training.text_bytes)
    trained = labelled(parts.training)
    seen = {line.text for line in trained}
    found = []
    for part, count in ((parts.calibration, training.calibration_lines), (parts.heldout, training.heldout_lines)):
        fresh = [line for line in labelled(part) if line.text not in seen]
        found.append(balanced(fresh, count // len(KINDS), training.seed))
        seen |= {line.text for line in fresh}
    return trained, found[0], found[1]


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(epochs=options.epochs)
    lines, calibration, heldout = sets(read_modules(options.library), training)
    tokenizer = train_tokenizer([line.text for line in lines], training.vocabulary)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, options.out)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    model = train(tokenizer, lines, training)
    model.save_pretrained(options.out)
    print(f"{len(lines)} lines, {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    for name, held in (("calibration", calibration), ("heldout", heldout)):
        write_lines(held, options.out / f"{name}.jsonl")
        print(f"{name} {len(held)} lines accuracy {accuracy(model, tokenizer, held):.4f}", flush=True)


if __name__ == "__main__":
    main()
