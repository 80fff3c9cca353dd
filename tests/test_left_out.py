"""What is left out is said: every precision and family is either among the routes or rejected with a reason."""

from __future__ import annotations

import pytest
from profiles import BERT_BASE, LLAMA_3_8B, MODELS, RESNET_50, SIX
from toy_components import installed

from qhub import NoRouteError, Scheme
from qhub.route.left_out import precision_of
from qhub.route.recommend import recommend
from qhub.route.registry import load_registry
from qhub.types import Goals

REGISTRY = load_registry()
PRECISIONS = {"fp32", "fp16", "bf16", "int8", "int4", "nf4", "mixed", "binary/ternary", "fp8", "nvfp4"}


def look(model, target, goals=None, have=()):
    return recommend(model, [REGISTRY.targets[target]], goals or Goals(), installed(have), registry=REGISTRY)


def why(found, target, what):
    return next(item.reason for item in found.rejected if item.route == f"{target}: {what}")


@pytest.mark.parametrize("target", REGISTRY.targets)
@pytest.mark.parametrize("model", SIX, ids=lambda model: model.source)
def test_every_precision_is_taken_or_rejected(model, target):
    try:
        found = look(model, target)
    except NoRouteError:
        return
    taken = {precision_of(Scheme.parse(route.scheme)) for route in found.routes}
    rejected = {item.route.removeprefix(f"{target}: ") for item in found.rejected}
    assert taken | rejected >= PRECISIONS
    assert not (PRECISIONS - {"mixed"}) & taken & rejected
    families = {route.family for route in found.routes}
    assert {"qat", "static", "dynamic"} <= families | rejected
    assert all(len(item.reason) > 5 for item in found.rejected)


@pytest.mark.parametrize(
    ("model", "target", "what", "reason"),
    [
        (RESNET_50, "intel-cpu-avx2", "dynamic", "does not take every op: linear and recurrent layers only, and 100% of"),
        (BERT_BASE, "nvidia-ada", "dynamic", "kernels for CPUs only"),
        (LLAMA_3_8B, "nvidia-ada", "dynamic", "gain where many requests share the weights"),
        (LLAMA_3_8B, "nvidia-ada", "static", "outliers"),
        (LLAMA_3_8B, "nvidia-ada", "fp8", "`nvidia-ada` computes FP8, but no plugin offers it yet"),
        (LLAMA_3_8B, "nvidia-ampere", "fp8", "FP8 arithmetic needs compute capability 8.9; `nvidia-ampere` has `8.6`"),
        (LLAMA_3_8B, "nvidia-ada", "nvfp4", "needs compute capability 10"),
        (LLAMA_3_8B, "nvidia-blackwell", "nvfp4", "`nvidia-blackwell` computes NVFP4, but no plugin offers it yet"),
        (LLAMA_3_8B, "apple-m1", "nf4", "made for NVIDIA GPUs; `apple-m1` has none"),
        (LLAMA_3_8B, "apple-m1", "mlx", "planned, not published yet"),
        (LLAMA_3_8B, "nvidia-ada", "hf", "not installed: `pip install qhub-hf`"),
        (LLAMA_3_8B, "nvidia-ada", "autoawq", "archived (AutoAWQ README"),
        (MODELS["visual-wake-words"], "cortex-m4", "bf16", "its kernels take full int8 only"),
        (MODELS["mystery"], "intel-cpu-avx2", "int8", "how much a model of unknown type loses is unknown"),
        (BERT_BASE, "intel-cpu-avx2", "int4", "gain only size"),
    ],
)  # fmt: skip
def test_reasons_are_those_of_an_expert(model, target, what, reason):
    assert reason in why(look(model, target), target, what)


def test_what_a_plugin_offers_is_not_research():
    found = look(LLAMA_3_8B, "nvidia-ada", have=("ternary", "awq", "hf"))
    assert [route.method for route in found.routes] == ["awq", "ternary"]
    assert not any(item.route == "nvidia-ada: binary/ternary" for item in found.rejected)


@pytest.mark.parametrize("model", SIX, ids=lambda model: model.source)
def test_an_archived_tool_is_never_part_of_a_route(model):
    archived = {entry.name for entry in REGISTRY.index.values() if not entry.is_offered}
    assert archived
    for target in REGISTRY.targets.values():
        try:
            found = recommend(model, [target], Goals(), installed(()), registry=REGISTRY)
        except NoRouteError:
            continue
        assert not archived & {part for route in found.routes for part in (route.method, *route.missing)}
