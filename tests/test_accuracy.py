"""Expected accuracy drops: ordered as everyone finds them, in the ranges of the guides, and each with its source."""

from __future__ import annotations

from dataclasses import replace

import pytest
from profiles import BERT_BASE, LLAMA_3_8B, MINILM, MODELS, RESNET_50, SD_UNET, WHISPER_BASE

from qhub import Scheme
from qhub.route.accuracy import expected_drop
from qhub.route.precision import family_of


def drop(model, scheme, family=None, **more):
    scheme = Scheme.parse(scheme)
    return expected_drop(model, scheme, family or family_of(scheme), **more)


# The guide's table of precisions: 0.1 % for float16, 1 to 3 % for int8, 3 to 5 % for int4 without groups.
@pytest.mark.parametrize("model", [m for m in MODELS.values() if m.task != "llm"], ids=lambda model: model.source)
@pytest.mark.parametrize(("scheme", "least", "most"), [("fp16", 0.0, 0.1), ("w8a8-static", 1, 3), ("w8a8-dynamic", 1, 3), ("w4a16", 3, 5)])
def test_drops_are_in_the_ranges_of_the_guide(model, scheme, least, most):
    assert least <= drop(model, scheme).pct <= most


def test_tolerance_orders_the_types_of_models():
    drops = [drop(model, "w8a8-static").pct for model in (RESNET_50, MODELS["yolo"], BERT_BASE, MINILM)]
    assert drops == sorted(set(drops))
    assert drop(WHISPER_BASE, "w8a8-static").pct == drop(RESNET_50, "w8a8-static").pct
    assert drop(SD_UNET, "w8a8-static").pct == drop(MINILM, "w8a8-static").pct


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.source)
def test_retraining_loses_less_than_one_percent_and_less_than_rounding(model):
    found = drop(model, "w8a8-static", "qat").pct
    assert found <= 1.0
    assert found < drop(model, "w8a8-static").pct


# Language models: fewer bits lose more, data helps, small models want small groups.
def test_fewer_bits_lose_more():
    drops = [drop(LLAMA_3_8B, scheme).pct for scheme in ("bf16", "w8a16", "w6-g128", "w5-g128", "w4-g128", "w3-g128", "w2-g128")]
    assert drops == sorted(set(drops))
    assert drop(LLAMA_3_8B, "w7-g128") == drop(LLAMA_3_8B, "w6-g128")


@pytest.mark.parametrize(
    ("model", "scheme", "uses_data", "pct"),
    [
        ("llama-3-8b", "w4-g128", True, 1.0),
        ("llama-3-8b", "w4-g128", False, 2.0),
        ("llama-3-8b", "w4a16", True, 2.0),
        ("llama-3.2-1b", "w4-g32", True, 1.0),
        ("llama-3.2-1b", "w4-g128", True, 2.0),
        ("llama-3.2-1b", "w4-g128", False, 4.0),
        ("llama-3.2-1b", "w8a16", False, 0.1),
        ("llama-3-8b", "nf4", True, 1.5),
        ("llama-3-8b", "w8a8-dynamic", True, 0.8),
    ],
)
def test_data_and_groups_count(model, scheme, uses_data, pct):
    assert drop(MODELS[model], scheme, uses_data=uses_data).pct == pct


def test_what_nobody_measured_is_unknown():
    assert drop(RESNET_50, "w4a4-static").pct is None


def test_nothing_is_lost_by_storing_what_is_stored():
    assert drop(LLAMA_3_8B, "bf16").pct == 0.0
    assert drop(LLAMA_3_8B, "fp16").basis == "bf16 → fp16 costs about 0.1 %"


@pytest.mark.parametrize("scheme", ["fp16", "w8a16", "w4-g128", "w3-g64", "w8a8-static", "nf4"])
def test_every_drop_has_its_basis(scheme):
    assert len(drop(LLAMA_3_8B, scheme).basis) > 10
    assert "unknown (taken as sensitive)" in drop(replace(RESNET_50, task="unknown"), "w8a8-static").basis
