"""From a job to its result: rounds of training until the drop is within the goal, each with other parameters (seeds' chart: "adjust")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from qhub import GraphJob, GraphResult, TorchGraph, Unsupported
from qhub_qat import checkpoint
from qhub_qat.items import Items
from qhub_qat.options import Settings
from qhub_qat.plan import plan_of
from qhub_qat.prepared import Prepared, started
from qhub_qat.teacher import Score, Teacher, by_channels_last
from qhub_qat.train import Course, Progress, Round, Trainer, put_state, starting_with, state_of

_FIRST_LOOK = 8  # batches that the ranges begin with
#: Weights or tensors of at most so many bits → learning rate and epochs. At 8 bits little is to be won, and much to be forgotten.
_PACES = ((4, 1e-4, 10), (8, 1e-5, 4))
#: What each round changes, in turn: learning rate, epochs, share of the labels, each times so much.
_ADJUSTMENTS = ((1.0, 1, 1.0), (1 / 3, 1, 0.0), (2.0, 2, 1.0))


def quantize(job: GraphJob, settings: Settings) -> GraphResult:
    """Train the network of `job` with its weights and tensors rounded.

    :raises Unsupported: when the network is no program.
    """
    graph = job.graph
    if not isinstance(graph, TorchGraph):
        hint = "give the model it was made from, or quantize it without training: `--no-retrain`"
        raise Unsupported("`qat` trains programs and modules, and an ONNX file is neither", hint=hint)
    plan = plan_of(graph, job.scheme, job.scheme_of, edges=settings.edges == "int8")
    prepared = by_channels_last(started(graph, plan, islice(job.calibration(), _FIRST_LOOK)))
    course = _course(job, graph, settings)
    progress = _train(prepared, course, _first_round(job, settings), job)
    put_state(prepared, progress.best)
    result = prepared.result()
    return replace(result, notes={**result.notes, "training": _told(progress)})


def _course(job: GraphJob, graph: TorchGraph, settings: Settings) -> Course:
    items = Items.of(job)
    training, held = items.split(settings.held)
    key = json.dumps([asdict(settings), str(job.scheme), job.seed, job.max_drop_pct, items.count], sort_keys=True)
    return Course(training, Teacher(graph, held, settings.batch), settings, job.work, job.seed, key, job.progress)


def _first_round(job: GraphJob, settings: Settings) -> Round:
    bits = min(job.scheme.weight_bits, job.scheme.activation_bits)
    lr, epochs = next((lr, epochs) for most, lr, epochs in _PACES if bits <= most)
    return Round(0, settings.lr or lr, settings.epochs or epochs, settings.labels)


def adjusted(base: Round, index: int) -> Round:
    """The parameters of round `index`."""
    lr, epochs, labels = _ADJUSTMENTS[index % len(_ADJUSTMENTS)]
    return Round(index, base.lr * lr, base.epochs * epochs, base.labels * labels)


def _train(prepared: Prepared, course: Course, base: Round, job: GraphJob) -> Progress:
    """All rounds, going on after the last epoch that was finished."""
    known = checkpoint.read(course.work, course.key)
    progress, tensors = (Progress(state_of(prepared), course.teacher.score(prepared)), None) if known is None else _read(*known)
    while progress.round < course.settings.rounds and not (progress.tried and progress.score.drop_pct <= job.max_drop_pct):
        parameters = adjusted(base, progress.round)
        trainer = Trainer(prepared, course, parameters)
        if tensors is not None and progress.epoch:
            trainer.load(tensors)
        else:
            put_state(prepared, progress.best)
        tensors = None
        trainer.run(progress)
        _close(progress, parameters, job)
        trainer.save(progress)
    return progress


def _read(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[Progress, dict[str, torch.Tensor]]:
    state = {name: facts[name] for name in ("round", "epoch", "idle", "tried")}
    return Progress(starting_with(tensors, "best."), Score(**facts["score"]), **state), tensors


def _close(progress: Progress, parameters: Round, job: GraphJob) -> None:
    """Write down what a round brought, and make ready for the next."""
    progress.tried.append(
        {"lr": parameters.lr, "epochs": progress.epoch, "labels": parameters.labels, "drop_pct": round(progress.score.drop_pct, 3)}
    )
    valid = "yes" if progress.score.drop_pct <= job.max_drop_pct else "no"
    drop = f"{progress.score.drop_pct:.2f} % lost on items held back, {job.max_drop_pct:g} % allowed"
    job.note(f"round {parameters.index + 1} of training: accuracy valid? {valid} ({drop})")
    progress.round, progress.epoch, progress.idle = progress.round + 1, 0, 0


def _told(progress: Progress) -> str:
    return f"batch norms folded; rounds: {'; '.join(map(_of_round, progress.tried))}"


def _of_round(one: Mapping[str, Any]) -> str:
    return f"{one['epochs']} epochs at {one['lr']:.1e} (labels {one['labels']:g}): {one['drop_pct']:.2f} % lost"
