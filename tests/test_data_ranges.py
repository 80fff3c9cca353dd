"""Calibration and evaluation that do not feed the same values are told apart, and the cause is named."""

from __future__ import annotations

import numpy as np
import pytest

from qhub.data.ranges import collect_ranges, compare_ranges, merge, range_of

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pixels(seed, count=40):
    """Pictures with bright and dark parts, 0 .. 255."""
    random = np.random.default_rng(seed)
    base = random.uniform(0, 255, (count, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    return np.clip(base + random.normal(0, 10, base.shape), 0, 255).round()


RAW, UNIT, NORMALISED = (lambda x: x), (lambda x: x / 255), (lambda x: (x / 255 - MEAN) / STD)


def compared(calibration, evaluation):
    return compare_ranges({"x": range_of(calibration)}, {"x": range_of(evaluation)})


# Statistics.


def test_one_pass_over_batches_gives_the_statistics_of_all():
    values = np.random.default_rng(0).normal(3, 2, (100, 7)).astype(np.float32)
    found = collect_ranges({"x": values[start : start + 30]} for start in range(0, 100, 30))["x"]
    assert (found.low, found.high, found.count) == (values.min(), values.max(), 700)
    assert found.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-9)
    assert found.std == pytest.approx(values.std(dtype=np.float64), abs=1e-9)


def test_ids_and_masks_have_no_range():
    assert list(collect_ranges([{"input_ids": np.arange(4), "x": np.zeros(3, np.float16)}])) == ["x"]


def test_values_that_are_none_are_counted_apart():
    found = range_of(np.array([1.0, np.nan, np.inf, 3.0]))
    assert (found.low, found.high, found.count, found.not_finite) == (1.0, 3.0, 2, 2)


def test_merging_with_nothing_changes_nothing():
    nothing, something = range_of(np.array([np.nan])), range_of(np.array([1.0, 2.0]))
    assert merge(nothing, something).mean == 1.5
    assert merge(something, nothing).not_finite == 1
    assert merge(nothing, nothing).count == 0


# The same preprocessing on other items is no mismatch.


@pytest.mark.parametrize("steps", [RAW, UNIT, NORMALISED], ids=["raw", "rescaled", "normalised"])
@pytest.mark.parametrize("seed", range(5))
def test_other_items_of_the_same_kind_match(steps, seed):
    assert compared(steps(pixels(seed)), steps(pixels(seed + 100))) == []


def test_darker_pictures_match():
    assert compared(NORMALISED(pixels(0)), NORMALISED(pixels(1) * 0.6)) == []


def test_constant_inputs_match_themselves():
    assert compared(np.ones(5), np.ones(3)) == []


# Each pair of preprocessings that gets mixed up, both ways.


@pytest.mark.parametrize(
    ("calibration", "evaluation", "said"),
    [
        (UNIT, RAW, "the evaluation data look like pixels 0 .. 255 that were not rescaled"),
        (RAW, UNIT, "the calibration data look like pixels 0 .. 255 that were not rescaled"),
        (NORMALISED, RAW, "the evaluation data look like pixels 0 .. 255"),
        (RAW, NORMALISED, "the calibration data look like pixels 0 .. 255"),
        (UNIT, NORMALISED, "the calibration data are rescaled but not normalised"),
        (NORMALISED, UNIT, "the evaluation data are rescaled but not normalised"),
    ],
    ids=["1 and 255", "255 and 1", "normal and 255", "255 and normal", "1 and normal", "normal and 1"],
)
def test_a_mismatch_names_the_cause(calibration, evaluation, said):
    (message,) = compared(calibration(pixels(0)), evaluation(pixels(1)))
    assert said in message
    assert message.startswith("`x` was calibrated on ")


def test_a_single_outlier_is_called_one():
    values = np.random.default_rng(0).normal(0, 1, 10_000)
    (message,) = compared(values, np.append(values, 60.0))
    assert "single values lie far outside" in message


def test_shifted_values_are_a_mismatch():
    values = np.random.default_rng(0).normal(0, 1, 1000)
    (message,) = compared(values, values + 20)
    assert "values outside the calibrated range are clipped" in message


def test_values_that_use_few_steps_are_a_mismatch():
    values = np.random.default_rng(0).normal(0, 1, 1000)
    (message,) = compared(values * 50, values)
    assert "use few of the quantized steps" in message


def test_values_that_are_none_are_said():
    (message,) = compared(np.ones(4), np.array([1.0, np.nan]))
    assert message == "`x` holds 1 values that are NaN or infinite in the evaluation data; take those items out"


def test_an_input_of_one_side_only_is_said():
    one, two = {"x": range_of(np.ones(2))}, {"y": range_of(np.ones(2))}
    assert compare_ranges(one, two) == ["`x` is calibrated and not evaluated", "`y` is evaluated and was not calibrated"]
