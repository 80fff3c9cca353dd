"""One round of training: distillation on a cosine schedule, the best epoch kept, every finished epoch on the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qhub_qat import checkpoint
from qhub_qat.items import Items, augmentation
from qhub_qat.loss import against_labels, distance, first
from qhub_qat.options import Settings
from qhub_qat.prepared import Prepared
from qhub_qat.teacher import Score, Teacher, laid_out

_WARM_UP = 0.05  # of all steps
_SCALES_PER_STEP = 10.0  # how much faster step sizes move, as a share of themselves


@dataclass(frozen=True)
class Round:
    """The training parameters of one round, which is number `index` from 0."""

    index: int
    lr: float
    epochs: int
    labels: float


@dataclass(frozen=True)
class Course:
    """What all rounds share: items to train on, the float network, the options, where checkpoints lie, and whom to tell."""

    items: Items
    teacher: Teacher
    settings: Settings
    work: Path
    seed: int
    key: str
    progress: Callable[[int, int, str], None]


@dataclass
class Progress:
    """How far a training is: in round `round` the first `epoch` epochs are finished; `best` is the best state so far."""

    best: dict[str, torch.Tensor]
    score: Score
    round: int = 0
    epoch: int = 0
    idle: int = 0  # epochs since the best one
    tried: list[dict[str, Any]] = field(default_factory=list)  # finished rounds

    def facts(self, key: str) -> dict[str, Any]:
        """All but the tensors, as JSON values."""
        score = {"distance": self.score.distance, "drop_pct": self.score.drop_pct}
        return {"key": key, "score": score, "round": self.round, "epoch": self.epoch, "idle": self.idle, "tried": self.tried}


def state_of(prepared: Prepared) -> dict[str, torch.Tensor]:
    """A copy of all that is trained."""
    return {name: value.detach().clone() for name, value in prepared.named_parameters() if value.requires_grad}


def put_state(prepared: Prepared, state: Mapping[str, torch.Tensor]) -> None:
    """Give the network another state."""
    with torch.no_grad():
        for name, value in prepared.named_parameters():
            if name in state:
                value.copy_(state[name])


class Trainer:
    """Trains a prepared network for one round, from where `progress` says."""

    def __init__(self, prepared: Prepared, course: Course, parameters: Round) -> None:
        self.prepared, self.course, self.parameters = prepared, course, parameters
        self.optimizer = torch.optim.AdamW(_groups(prepared, parameters.lr), weight_decay=0.0, fused=True)
        self.augmented = augmentation(course.items, course.settings.augment)
        self.steps = parameters.epochs * sum(1 for _ in course.items.batches(course.settings.batch))

    def run(self, progress: Progress) -> None:
        """Train until the last epoch, or until `patience` epochs brought nothing; `progress` then holds the best state."""
        for epoch in range(progress.epoch, self.parameters.epochs):
            if progress.idle >= self.course.settings.patience:
                break
            self._epoch(epoch)
            score = self.course.teacher.score(self.prepared)
            better = score.distance < progress.score.distance
            if better:
                progress.best, progress.score = state_of(self.prepared), score
            progress.epoch, progress.idle = epoch + 1, 0 if better else progress.idle + 1
            self.save(progress)
            told = f"round {self.parameters.index + 1}, epoch {epoch + 1}: {score.distance:.4f} from the float network"
            self.course.progress(epoch + 1, self.parameters.epochs, told)

    def save(self, progress: Progress) -> None:
        """Leave all that is needed to go on from here."""
        tensors = {f"best.{name}": value for name, value in progress.best.items()}
        tensors |= {f"now.{name}": value for name, value in state_of(self.prepared).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        checkpoint.write(self.course.work, progress.facts(self.course.key), tensors)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `save` left."""
        put_state(self.prepared, starting_with(tensors, "now."))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in starting_with(tensors, "optimizer.").items():
            index, _, what = name.partition(".")
            states.setdefault(int(index), {})[what] = _laid_out_as(parameters[int(index)], value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})

    def _epoch(self, epoch: int) -> None:
        order = torch.Generator().manual_seed(self.course.seed * 1_000_003 + self.parameters.index * 10_007 + epoch)
        count = self.steps // self.parameters.epochs
        for step, (inputs, labels) in enumerate(self.course.items.batches(self.course.settings.batch, order)):
            self._set_rate(epoch * count + step)
            self._step(laid_out(self.augmented(inputs, order)), labels)

    def _step(self, inputs: list[torch.Tensor], labels: torch.Tensor | None) -> None:
        made = first(self.prepared(*inputs))
        loss = distance(made, self.course.teacher(inputs), embedding=self.course.teacher.embedding)
        if labels is not None and self.parameters.labels:
            loss = (1 - self.parameters.labels) * loss + self.parameters.labels * against_labels(made, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _set_rate(self, step: int) -> None:
        """Up in a straight line, then down on a cosine."""
        warm = max(1, int(self.steps * _WARM_UP))
        share = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * share


def starting_with(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value in the memory layout of its parameter: the fused optimizer goes through both side by side."""
    return torch.empty_like(parameter).copy_(value) if parameter.shape == value.shape and parameter.dim() else value


def _groups(prepared: Prepared, lr: float) -> list[dict[str, Any]]:
    """Weights move by `lr` a step at most, step sizes by a share of themselves."""
    scales = [(scale, lr * _SCALES_PER_STEP * float(scale.detach().abs().mean())) for scale in prepared.scales()]
    return [{"params": prepared.others(), "full": lr, "lr": lr}, *({"params": [scale], "full": full, "lr": full} for scale, full in scales)]
