"""The six well-known models from their configs alone give the same routes as the profiles written by hand, on every device."""

from __future__ import annotations

from pathlib import Path

import pytest
from profiles import SIX
from toy_components import installed

from qhub.route.profile import profile
from qhub.route.recommend import recommend
from qhub.route.registry import load_registry
from qhub.types import Goals

CONFIGS = Path(__file__).parent / "configs"
FOLDERS = {"bert-base": "bert-base-uncased", "stable-diffusion-unet": "stable-diffusion-1.5-unet"}
REGISTRY = load_registry()

pytestmark = pytest.mark.skipif(not CONFIGS.is_dir(), reason="the configs of well-known models are not beside the tests")


def best(model):
    found = recommend(model, list(REGISTRY.targets.values()), Goals(), installed(()), registry=REGISTRY)
    return {route.target: (route.method, route.scheme, route.fits) for route in reversed(found.routes)}


@pytest.mark.parametrize("model", SIX, ids=lambda model: model.source)
def test_a_config_alone_gives_the_same_routes(model):
    read = profile(str(CONFIGS / FOLDERS.get(model.source, model.source)), installed(()))
    assert best(read) == best(model)
