"""Figures of the block-streamed evaluation: those of plain transformers, whatever fits into memory."""

from __future__ import annotations

import pytest
import torch
from tiny_models import quantize, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from qhub import Quantizer, quantize_rtn
from qhub.events import Events
from qhub.prove import evaluate
from qhub.prove.evaluate import Evaluation, Setting
from qhub.prove.parity import reference_logits
from qhub.quantize.baseline import RoundedWeights
from qhub.quantize.store import QuantizedWeights
from qhub.skeleton import FloatWeights
from qhub.types import Scheme

FAMILIES = ["llama", "gemma2", "gpt2", "falcon-alibi", "opt"]
SCHEME = "w3a16-g32-asym"


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


@torch.no_grad()
def predictable_ids(model, samples=6, seq_len=40):
    """Windows in which every other token is the one that the model expects, so that accuracy is about one half."""
    ids = random_ids(samples, seq_len)
    for place in range(1, seq_len, 2):
        ids[:, place] = model(ids[:, :place]).logits[:, -1].argmax(-1)
    return ids


def plain_figures(logits, ids, reference=None):
    """By the book, in float64: all windows at once."""
    predicted = torch.log_softmax(logits[:, :-1].double(), -1)
    wanted, best = ids[:, 1:], predicted.argmax(-1)
    nll = -predicted.gather(-1, wanted.unsqueeze(-1)).mean()
    found = {"accuracy": float((best == wanted).double().mean()), "perplexity": float(nll.exp())}
    if reference is None:
        return {**found, "kl": None, "top1_agreement": None}
    expected = torch.log_softmax(reference[:, :-1].double(), -1)
    agreed = (expected.argmax(-1) == best).double().mean()
    return {**found, "kl": float((expected.exp() * (expected - predicted)).sum(-1).mean()), "top1_agreement": float(agreed)}


def assert_same(figures, expected, tolerance=1e-5):
    for name, value in expected.items():
        found = getattr(figures, name)
        assert found == (None if value is None else pytest.approx(value, rel=tolerance, abs=1e-7)), name


@torch.no_grad()
def opened(folder):
    """(model, ids, logits) of plain transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = predictable_ids(model)
    return model, ids, model(ids).logits.float()


@pytest.fixture
def evaluation(tmp_path):
    """Make an Evaluation of a float folder."""

    def make(folder, ids, **setting):
        return Evaluation(FloatWeights(folder), ids, Setting(tmp_path, **setting), Events())

    return make


@pytest.fixture
def quantized(tmp_path):
    """Make a QuantizedModel of a folder."""

    def make(source):
        quantize(source, tmp_path / "quantized", Nearest(), SCHEME)
        return tmp_path / "quantized" / "model"

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_models_figures_are_those_of_transformers(evaluation, family):
    _, ids, logits = opened(tiny_model(family))
    figures = evaluation(tiny_model(family), ids).float_figures()
    assert_same(figures, plain_figures(logits, ids))
    assert 0.45 < figures.accuracy < 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quantized_models_figures_are_those_of_transformers(evaluation, quantized, family):
    source = tiny_model(family)
    _, ids, logits = opened(source)
    folder = quantized(source)
    figures = evaluation(source, ids).compare(QuantizedWeights(folder), "quantized")
    assert_same(figures, plain_figures(reference_logits(folder, ids), ids, logits))
    assert figures.kl > 1e-3
    assert 0.2 < figures.top1_agreement < 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_baseline_rounded_as_it_is_read_is_the_model_rounded_on_disk(evaluation, quantized, family):
    source = tiny_model(family)
    _, ids, _ = opened(source)
    weights = QuantizedWeights(quantized(source))
    baseline = RoundedWeights(source, dict.fromkeys(weights.schemes, Scheme.parse(SCHEME)), weights.transposed)
    found = evaluation(source, ids)
    assert found.compare(baseline, "rtn") == found.compare(weights, "quantized")


def test_a_model_compared_with_itself_has_lost_nothing(evaluation):
    _, ids, _ = opened(tiny_model("llama"))
    found = evaluation(tiny_model("llama"), ids)
    figures, itself = found.float_figures(), found.compare(FloatWeights(tiny_model("llama")), "itself")
    assert (itself.accuracy, itself.perplexity) == (figures.accuracy, figures.perplexity)
    assert (itself.kl, itself.top1_agreement) == (0, 1)


def test_what_does_not_fit_into_memory_goes_to_disk_and_changes_nothing(evaluation, quantized, tmp_path):
    source = tiny_model("llama")
    _, ids, _ = opened(source)
    folder = quantized(source)
    before = sorted(tmp_path.iterdir())
    results = []
    for limit_bytes in (1 << 30, 0, 4 * 40 * 64 * 4):
        found = evaluation(source, ids, hidden_limit_bytes=limit_bytes)
        on_disk = found.reference._file is not None
        results.append((found.float_figures(), found.compare(QuantizedWeights(folder), "quantized"), on_disk))
    assert [on_disk for *_, on_disk in results] == [False, True, True]
    assert results[0][:2] == results[1][:2] == results[2][:2]
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("tokens", [2, 7, 39, 40])
def test_windows_cut_into_pieces_give_the_same_figures(evaluation, quantized, monkeypatch, tokens):
    """A large vocabulary has the logits computed in pieces; each prediction is still counted once."""
    source = tiny_model("llama")
    _, ids, logits = opened(source)
    folder = quantized(source)
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", tokens * 128)
    found = evaluation(source, ids)
    assert_same(found.float_figures(), plain_figures(logits, ids))
    assert_same(found.compare(QuantizedWeights(folder), "quantized"), plain_figures(reference_logits(folder, ids), ids, logits))


def test_a_number_of_windows_that_no_batch_divides_is_all_counted(evaluation):
    model = opened(tiny_model("llama"))[0]
    ids = predictable_ids(model, samples=7)
    with torch.no_grad():
        expected = plain_figures(model(ids).logits, ids)
    assert_same(evaluation(tiny_model("llama"), ids).float_figures(), expected)


def test_a_small_model_in_half_precision_is_measured_in_float32(evaluation):
    source = tiny_model("llama", torch.bfloat16)
    _, ids, logits = opened(source)
    assert_same(evaluation(source, ids).float_figures(), plain_figures(logits, ids))


def test_progress_names_what_is_measured_and_each_block(tmp_path):
    seen = []
    ids = random_ids(2, 16)
    source = tiny_model("llama")
    found = Evaluation(FloatWeights(source), ids, Setting(tmp_path), Events(listener=seen.append))
    found.compare(FloatWeights(source), "again")
    steps = [(event["stage"], event["name"]) for event in seen if event["event"] == "block"]
    blocks = ["model.layers.0", "model.layers.1"]
    assert steps == [(stage, name) for stage in ("evaluate float", "evaluate again") for name in blocks]
