"""One row per device: the best route, what is missing, bounds marked as bounds."""

from __future__ import annotations

import pytest
from profiles import BERT_BASE, LLAMA_3_8B, MODELS, SIX
from toy_components import installed

from qhub.route.matrix import columns, refused, rows
from qhub.route.recommend import recommend
from qhub.route.registry import load_registry
from qhub.types import Goals

REGISTRY = load_registry()
TARGETS = list(REGISTRY.targets.values())


def look(model, names, have=()):
    targets = [REGISTRY.targets[name] for name in names]
    found = recommend(model, targets, Goals(), installed(have), registry=REGISTRY)
    return found, targets


@pytest.mark.parametrize("model", SIX, ids=lambda model: model.source)
def test_every_device_has_a_row_and_every_cell_a_text(model):
    found = recommend(model, TARGETS, Goals(), installed(()), registry=REGISTRY)
    table = list(rows(found, TARGETS, REGISTRY))
    assert [row[0] for row in table] == [target.name for target in TARGETS]
    assert all(len(row) == len(columns(model.task)) and all(row) for row in table)
    without = [row[0] for row in table if row[1] == "–"]
    assert len(list(refused(found, TARGETS))) == len(without)


def test_a_row_is_the_best_route():
    found, targets = look(LLAMA_3_8B, ["apple-m1", "cortex-m4"], ("awq", "rtn", "mlx"))
    best, none = rows(found, targets, REGISTRY)
    assert best[:4] == ("apple-m1", "awq", "w4a16-g128-asym", "mlx")
    assert best[-2:] == ("1 %", "yes")
    assert none == ("cortex-m4", *["–"] * 7, "no")
    assert list(refused(found, targets)) == ["`cortex-m4` has no operating system and no room for a language model"]


def test_what_is_missing_is_marked():
    (row,) = rows(*look(LLAMA_3_8B, ["apple-m1"], ("awq",)), REGISTRY)
    assert row[3] == "mlx (missing)"
    (row,) = rows(*look(MODELS["resnet-50"], ["tpu"]), REGISTRY)
    assert row[3] == "–"


@pytest.mark.parametrize(
    ("model", "target", "sign"),
    [("demo-llm", "apple-m1", "≤ "), ("llama-3-8b", "apple-m1", ""), ("bert-base", "nvidia-hopper", "≥ "), ("bert-base", "apple-m1", "")],
)
def test_a_bound_is_marked_as_one(model, target, sign):
    (row,) = rows(*look(MODELS[model], [target]), REGISTRY)
    assert row[6].startswith(sign or ("1", "2"))


def test_the_unit_of_speed_follows_the_task():
    assert (columns(LLAMA_3_8B.task)[6], columns(BERT_BASE.task)[6]) == ("tokens/s", "ms")
