"""A method that takes the whole model: the core stores its codes, zeros and scales, and every float tensor that it changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import logits_of, random_ids, tiny_model
from toy_whole import write_toy

from qhub.errors import PluginError, Unsupported, UsageError
from qhub.events import Events
from qhub.interfaces import ModelJob, WholeModel
from qhub.quantize.block import LayerChoice
from qhub.quantize.compose import compose
from qhub.quantize.grid import quantize_rtn
from qhub.quantize.qtensor import QTensor
from qhub.quantize.store import QuantizedWeights, finish
from qhub.quantize.walk import WalkPlan, WalkResult, clean
from qhub.quantize.whole import fit_store, quantize_whole
from qhub.skeleton import FloatWeights
from qhub.types import Scheme

SCHEME = "w4a16-g32-asym"


class Nearest(WholeModel):
    """Rounds what it is given; `spoil` may change the result's layers or tensors."""

    name = "nearest"

    def __init__(self, source: Path, spoil=None) -> None:
        super().__init__()
        self.weights, self.spoil, self.jobs = FloatWeights(source), spoil, []

    def quantize_model(self, job: ModelJob) -> None:
        self.jobs.append(job)
        (job.out / "done").touch()

    def read_result(self, out: Path):
        assert (out / "done").exists()
        job = self.jobs[-1]
        layers = {
            name: quantize_rtn(self.weights.read(f"{name}.weight").float(), scheme, torch.float32) for name, scheme in job.schemes.items()
        }
        floats = {name: self.weights.read(name) for name in self.weights if name.removesuffix(".weight") not in layers}
        if self.spoil is not None:
            self.spoil(layers, floats)
        return Made(layers, floats)


class Made:
    """Everything in memory."""

    def __init__(self, layers, floats) -> None:
        self.layers, self.floats = layers, floats

    def tensor_names(self):
        return list(self.floats)

    def tensor(self, name: str) -> torch.Tensor:
        return self.floats[name]

    def layer(self, name: str) -> QTensor:
        return self.layers[name]


def take(source: Path, out: Path, method: WholeModel, *, scheme: str = SCHEME, overrides=None, ids=None, notes=None) -> WalkResult:
    """Quantize, and finish the folder `out / "model"`."""
    for name in ("model", "work"):
        (out / name).mkdir(parents=True, exist_ok=True)
    plan = WalkPlan(source, out / "model", out / "work", method, LayerChoice(Scheme.parse(scheme), overrides or {}), ids)
    listener = None if notes is None else lambda event: notes.append(event)
    result = quantize_whole(plan, method, Events(listener=listener))
    facts = {"scheme": scheme, "method": method.name, "layers": {name: str(one) for name, one in result.schemes.items()}}
    finish(out / "model", source, result.schemes, result.ignored, facts)
    return result


@pytest.mark.parametrize("scheme", [SCHEME, "w4a16-g32-sym", "w3a16-g64-asym", "w8a16"])
def test_codes_scales_and_zeros_are_the_methods_own(tmp_path, scheme):
    source = tiny_model("llama", torch.bfloat16)
    method = Nearest(source)
    result = take(source, tmp_path, method, scheme=scheme)
    stored = QuantizedWeights(tmp_path / "model")
    made = method.read_result(tmp_path / "work" / "whole")
    assert len(result.schemes) == 14
    for name in result.schemes:
        there, given = stored.layer(name), made.layer(name)
        expected, _ = fit_store(given, torch.bfloat16)
        assert torch.equal(there.codes, expected.codes)
        assert torch.equal(there.scale, expected.scale)
        assert torch.equal(there.zero, expected.zero)


def test_it_is_given_tokens_schemes_and_what_stays_float(tmp_path):
    source, ids = tiny_model("llama"), random_ids(4, 16)
    method = Nearest(source)
    overrides = {"down_proj": None, "q_proj": Scheme.parse("w8a16-g32-asym")}
    result = take(source, tmp_path, method, ids=ids, overrides=overrides)
    (job,) = method.jobs
    assert job.ids is ids
    assert job.source == source
    assert job.float_layers == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert str(job.schemes["model.layers.0.self_attn.q_proj"]) == "w8a16-g32-asym"
    assert set(job.float_layers) | {"lm_head"} == set(result.ignored)
    assert torch.isfinite(logits_of(QuantizedWeights(tmp_path / "model"), ids)).all()


def test_what_it_changed_beside_the_layers_is_stored(tmp_path):
    source = tiny_model("llama")
    name = "model.layers.1.input_layernorm.weight"
    take(source, tmp_path, Nearest(source, lambda layers, floats: floats.update({name: floats[name] * 2})))
    stored = QuantizedWeights(tmp_path / "model")
    assert torch.equal(stored.read(name), FloatWeights(source).read(name) * 2)
    other = "model.layers.0.input_layernorm.weight"
    assert torch.equal(stored.read(other), FloatWeights(source).read(other))


def test_a_tensor_that_it_does_not_give_is_as_it_was(tmp_path):
    source = tiny_model("llama")
    take(source, tmp_path, Nearest(source, lambda layers, floats: floats.clear()))
    name = "model.norm.weight"
    assert torch.equal(QuantizedWeights(tmp_path / "model").read(name), FloatWeights(source).read(name))


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layers, floats: floats.update({f"{LAYER}.bias": torch.zeros(64)}), f"`nearest` made the tensor `{LAYER}.bias`"),
        (lambda layers, floats: floats.update({"model.norm.weight": torch.zeros(3)}), "`nearest` damaged the tensor `model.norm.weight`"),
        (
            lambda layers, floats: floats.update({"model.norm.weight": torch.full((64,), float("nan"))}),
            "`nearest` damaged the tensor `model.norm.weight`",
        ),
        (
            lambda layers, floats: layers.update({LAYER: quantize_rtn(torch.randn(64, 64), Scheme.parse("w8a16-g32-asym"), torch.float32)}),
            f"`nearest` did not quantize `{LAYER}` to `{SCHEME}`",
        ),
        (
            lambda layers, floats: layers.update({LAYER: with_scale(layers[LAYER], float("nan"))}),
            f"`nearest` gave layer `{LAYER}` a scale that is not a positive number",
        ),
    ],
    ids=["a tensor too many", "another shape", "no number", "another scheme", "a scale that is no number"],
)
def test_what_cannot_be_stored_is_refused(tmp_path, spoil, message):
    source = tiny_model("llama")
    with pytest.raises(PluginError, match=message):
        take(source, tmp_path, Nearest(source, spoil))


def with_scale(tensor: QTensor, value: float) -> QTensor:
    return QTensor(tensor.codes, torch.full_like(tensor.scale, value), tensor.zero, tensor.bits, tensor.symmetric)


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", "w4a16-g128-asym", "the group size does not divide"),
        ("gpt2", SCHEME, "`nearest` takes plain linear layers; `.*` is a `Conv1D`"),
    ],
)
def test_models_that_it_cannot_take_are_refused_before_it_works(tmp_path, family, scheme, message):
    method = Nearest(tiny_model(family))
    with pytest.raises(Unsupported, match=message):
        take(tiny_model(family), tmp_path, method, scheme=scheme)
    assert method.jobs == []


def test_it_does_not_work_twice_when_only_the_storing_was_interrupted(tmp_path):
    source = tiny_model("llama")
    method = Nearest(source, lambda layers, floats: layers.pop("model.layers.1.mlp.up_proj"))
    with pytest.raises(KeyError):
        take(source, tmp_path, method)
    method.spoil = None
    take(source, tmp_path, method)
    assert len(method.jobs) == 1
    assert not list((tmp_path / "work").glob("*.growing"))
    clean(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_progress_is_told_block_by_block(tmp_path):
    events = []
    take(tiny_model("llama"), tmp_path, Nearest(tiny_model("llama")), notes=events)
    assert [event["event"] for event in events] == ["note", "block", "block"]
    assert events[0]["text"] == "`nearest` works on the whole model at once"


# What the store's other layouts need of a tensor.


def tensor(scale: float, zero: float, codes: int, bits: int = 4) -> QTensor:
    full = torch.full((1, 16), codes, dtype=torch.uint8)
    full[0, 0] = 0
    return QTensor(full, torch.tensor([[scale]]), torch.tensor([[zero]]), bits, False)


def test_a_scale_that_16_bits_hold_is_kept():
    given = tensor(0.0078125, 3.0, 9)
    found, notes = fit_store(given, torch.float32)
    assert (found.scale.item(), notes) == (0.0078125, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_other_goes_to_the_nearest_that_they_hold_and_that_is_said(dtype):
    found, notes = fit_store(tensor(0.0123456, 3.0, 9), dtype)
    assert found.scale.item() == found.scale.half().item()
    assert found.scale.item() == found.scale.to(dtype).item()
    assert abs(found.scale.item() / 0.0123456 - 1) < (2e-3 if dtype == torch.bfloat16 else 3e-4)
    assert notes[0].startswith("1 of 1 scales rounded to 16 bits, by at most ")


@pytest.mark.parametrize("scale", [1e-12, 1e9], ids=["tiny", "huge"])
def test_a_scale_beyond_what_16_bits_hold_is_the_last_that_they_do(scale):
    found, notes = fit_store(tensor(scale, 3.0, 9), torch.bfloat16)
    assert found.scale.item() in (2.0**-24, 65280.0)
    assert notes


def test_a_zero_of_0_is_raised_where_the_codes_leave_room():
    given = tensor(0.5, 0.0, 14)
    found, notes = fit_store(given, torch.float32)
    assert (found.zero.item(), found.codes.max().item(), notes) == (1.0, 15, [])
    assert torch.equal(found.dequantize(), given.dequantize())


def test_elsewhere_it_stays_and_that_is_said():
    given = tensor(0.5, 0.0, 15)
    found, notes = fit_store(given, torch.float32)
    assert (found.zero.item(), notes) == (0.0, ["1 of 1 zeros are 0"])
    assert torch.equal(found.dequantize(), given.dequantize())


def test_it_combines_with_no_other_method(tmp_path):
    source = tiny_model("llama")
    scaler = Nearest(source)
    scaler.scales = True
    with pytest.raises(UsageError, match="`nearest` takes the whole model and combines with no other method"):
        compose([scaler, Nearest(source)])


def test_the_toy_of_other_tests_is_such_a_method(tmp_path, monkeypatch):
    folder = write_toy(tmp_path / "here")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "qhub_toy", raising=False)
    monkeypatch.delitem(os.environ, "TOY", raising=False)
    import qhub_toy

    source = tiny_model("llama")
    result = take(source, tmp_path, qhub_toy.Toy(), ids=random_ids(2, 8))
    assert len(result.schemes) == 14
