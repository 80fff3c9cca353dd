"""`a+b`: who scales and who rounds."""

from __future__ import annotations

import pytest

from qhub.errors import UsageError
from qhub.interfaces import Quantizer
from qhub.quantize.compose import Composite, compose
from qhub.types import ModelProfile, Scheme


class Scaler(Quantizer):
    name = "scaler"
    scales = True
    needs = frozenset({"gram"})

    def scale_group(self, group, block):
        return "the scaler's scale"

    def quantize_group(self, group, block):
        return "the scaler's rounding"


class Rounder(Quantizer):
    name = "rounder"
    needs = frozenset({"shortfall"})

    def quantize_group(self, group, block):
        return "the rounder's rounding"

    def reject(self, profile, scheme):
        return "too few bits" if scheme.weight_bits == 2 else None


PROFILE = ModelProfile("m", "m", "llm", "Llama", 1, "F32", 4)


@pytest.mark.parametrize("parts", [[Scaler(), Rounder()], [Rounder(), Scaler()]], ids=["in order", "in reverse order"])
def test_one_scales_and_the_other_rounds(parts):
    both = compose(parts)
    assert both.name == "scaler+rounder"
    assert both.needs == {"gram", "shortfall"}
    assert both.scale_group(None, None) == "the scaler's scale"
    assert both.quantize_group(None, None) == "the rounder's rounding"


def test_the_reason_of_either_part_rejects():
    both = compose([Scaler(), Rounder()])
    assert both.reject(PROFILE, Scheme.parse("w2-g64")) == "too few bits"
    assert both.reject(PROFILE, Scheme.parse("w4-g64")) is None
    assert both.reject(PROFILE, Scheme.parse("fp16")) == "`scaler` does not write scheme `fp16`"


def test_one_part_stays_itself():
    part = Rounder()
    assert compose([part]) is part


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Rounder(), Rounder()], "`rounder` has no input scales to give to `rounder`"),
        ([Scaler(), Scaler(), Rounder()], "cannot combine `3` quantizers: scaler, scaler, rounder"),
    ],
    ids=["nobody scales", "three"],
)
def test_what_does_not_combine_is_a_usage_error(parts, message):
    with pytest.raises(UsageError) as error:
        compose(parts)
    assert error.value.message == message
    assert error.value.hint


def test_two_that_scale_are_combined_in_the_order_given():
    assert isinstance(compose([Scaler(), Scaler()]), Composite)


def test_scales_of_awq_with_the_rounding_of_gptq(tmp_path):
    awq, gptq = pytest.importorskip("qhub_awq.plugin"), pytest.importorskip("qhub_gptq.plugin")
    from tiny_models import logits_of, quantize, quantized_logits, random_ids, tiny_model

    source, ids = tiny_model("llama"), random_ids(8, 32)
    expected, errors = logits_of(source, ids), {}
    for parts in ([awq.Awq()], [gptq.Gptq(), awq.Awq()]):
        quantizer = compose(parts)
        assert not quantize(source, tmp_path / quantizer.name, quantizer, "w3a16-g32-asym", ids=ids).notes
        errors[quantizer.name] = float((quantized_logits(tmp_path / quantizer.name / "model", ids) - expected).square().mean())
    assert errors["awq+gptq"] < errors["awq"]
