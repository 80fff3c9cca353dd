"""Trained models: logits against the torch reference, perplexity of the fast path, and a text that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from qhub_native import _native
from qhub_native.load import Options
from qhub_native.session import NativeSession
from references import off, reference
from tiny_models import quantize
from tokenizers import Tokenizer

from qhub.plugins import Plugins

ASSETS = Path(__file__).parent.parent.parent.parent.parent / "shared" / "assets"
STORIES = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    " She wanted to play with it, but it was too high."
)
WINDOW = 256


def source_of(name):
    """(model, text) of a trained model."""
    if name == "demo:llm":
        found = Plugins.load().models[name]
        return found.path, found.evaluation
    folder = ASSETS / name
    if not folder.exists():
        pytest.skip(f"`{folder}` is not there")
    return folder, folder / "heldout.txt" if name == "py-llama-6m" else ASSETS / "text" / "tinystories_val.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name, scheme → the folder of the QuantizedModel, made once."""
    folders = {}

    def make(name, scheme):
        if (name, scheme) not in folders:
            out = tmp_path_factory.mktemp("trained")
            source, _ = source_of(name)
            # stories260k: no group divides the 172 inputs of its down_proj
            overrides = {"*.down_proj": "float"} if name.startswith("stories") else {}
            quantize(source, out, Plugins.load().quantizers["rtn"], scheme, overrides=overrides)
            folders[name, scheme] = out / "model"
        return folders[name, scheme]

    return make


def windows(name, folder, count):
    """ids (count, WINDOW) of the model's own text."""
    text = Path(source_of(name)[1]).read_text(encoding="utf-8")[: 40_000 + 20 * WINDOW * count]
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return np.array(ids[: count * WINDOW]).reshape(count, WINDOW)


def session(folder, *, exact):
    return NativeSession(folder, Options(2, _native.kernel_names()[0], exact=exact, forced=True))


def perplexity(opened, ids):
    logits = opened.logits(ids)[:, :-1].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    normed = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(normed, ids[:, 1:, None], 2).mean()))


MODELS = [("demo:llm", "w4a16-g32-asym"), ("py-llama-6m", "w4a16-g128-asym"), ("stories260k-hf", "w4a16-g32-asym")]


@pytest.mark.parametrize(("name", "scheme"), MODELS, ids=[name for name, _ in MODELS])
def test_exact_logits_are_those_of_the_reference(name, scheme, made):
    folder = made(name, scheme)
    ids = windows(name, folder, 2)
    assert off(session(folder, exact=True).logits(ids), reference(folder, torch.from_numpy(ids))) < 1e-4


@pytest.mark.parametrize(("name", "scheme"), MODELS, ids=[name for name, _ in MODELS])
def test_perplexity_of_the_fast_path_is_within_half_a_percent(name, scheme, made):
    folder = made(name, scheme)
    ids = windows(name, folder, 16)
    assert perplexity(session(folder, exact=False), ids) == pytest.approx(perplexity(session(folder, exact=True), ids), rel=0.005)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_the_known_story_is_told_word_for_word(exact, made):
    folder = made("stories260k-hf", "w8a16-g64-sym")
    tokens = session(folder, exact=exact).generate([1], 80)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(tokens)).startswith(STORIES)
