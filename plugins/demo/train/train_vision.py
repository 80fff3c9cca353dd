"""Train the demo image model: a small ResNet on pictures of shapes that `shapes.py` draws.

    python train_vision.py                     # writes ../qhub_demo/data/vision, the files that are shipped
    python train_vision.py --out /tmp/vision --epochs 2

Needs torch and transformers; no network, no data. The seed fixes pictures, initial weights and order: on one thread of the same
processor, with the same torch, a run repeats bit for bit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from shapes import CLASSES, SIDE, draw
from torch import Tensor
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

SHIPPED = Path(__file__).resolve().parent.parent / "qhub_demo" / "data" / "vision"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Training:
    """What decides the result; the defaults are those of the shipped model."""

    images: int = 40_000
    epochs: int = 11
    batch_images: int = 80
    peak_rate: float = 4e-3
    weight_decay: float = 0.02
    smoothing: float = 0.05
    calibration_images: int = 192
    heldout_images: int = 1_000
    seed: int = 20


def build_model(seed: int) -> ResNetForImageClassification:
    """Basic residual blocks with batch norms, 16 to 48 channels."""
    torch.manual_seed(seed)
    names = dict(enumerate(CLASSES))
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=16,
            hidden_sizes=[16, 32, 48],
            depths=[2, 2, 1],
            layer_type="basic",
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )


def inputs_of(pixels: NDArray[np.uint8]) -> Tensor:
    """(B, 3, 32, 32) float32, as preprocessor_config.json says."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def train(training: Training) -> ResNetForImageClassification:
    """All epochs, each over every picture, turned, mirrored and recoloured anew."""
    model = build_model(training.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.peak_rate, weight_decay=training.weight_decay)
    steps = training.epochs * (training.images // training.batch_images)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.peak_rate, total_steps=steps, pct_start=0.15)
    began = time.process_time()
    data = draw(training.images, training.seed)
    for epoch in range(training.epochs):
        random = np.random.RandomState(training.seed + epoch)
        loss = _epoch(model.train(), _batches(data, random, training), (optimizer, schedule), training)
        print(f"epoch {epoch + 1} loss {loss:.4f} CPU seconds {time.process_time() - began:.0f}", flush=True)
    return model.eval()


def _batches(
    data: tuple[NDArray[np.uint8], NDArray[np.int64]], random: np.random.RandomState, training: Training
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every picture once, in a new order; a batch shares one of 48 ways to turn it, mirror it and exchange its colours."""
    pixels, labels = data
    for chosen in np.split(random.permutation(len(labels)), len(labels) // training.batch_images):
        turned = np.rot90(pixels[chosen], random.randint(4), axes=(1, 2))
        turned = turned[:, :, :: random.choice((1, -1)), random.permutation(3)]
        yield inputs_of(np.ascontiguousarray(turned)), torch.from_numpy(labels[chosen])


def _epoch(
    model: ResNetForImageClassification,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler],
    training: Training,
) -> float:
    """One pass; the mean loss."""
    optimizer, schedule = steps
    losses = []
    for inputs, labels in batches:
        loss = functional.cross_entropy(model(inputs).logits, labels, label_smoothing=training.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Share of pictures whose class is the model's first choice."""
    found = torch.cat([model(part).logits.argmax(-1) for part in inputs_of(pixels).split(200)])
    return float((found.numpy() == labels).mean())


def write(model: ResNetForImageClassification, training: Training, out: Path) -> None:
    """Model, preprocessing, and the pictures for calibration and evaluation."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, count, seed in (("calibration", training.calibration_images, 1), ("heldout", training.heldout_images, 2)):
        pixels, labels = draw(count, training.seed + seed)
        # channels first, (N, 3, 32, 32): neighbours in the file are then alike, which saves a ninth
        np.savez_compressed(out / f"{name}.npz", x=pixels.transpose(0, 3, 1, 2), y=labels, class_names=np.array(CLASSES))
        print(f"{name} accuracy {accuracy(model, pixels, labels):.4f}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(epochs=options.epochs)
    model = train(training)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    write(model, training, options.out)


if __name__ == "__main__":
    main()
