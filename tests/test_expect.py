"""What a run is expected to take, corrected by what earlier runs on this machine took, and what is learned from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_preflight import RECIPE
from test_report import REPORT

from qhub import history
from qhub.expect import Expectation, engine_of, expect, expect_speed, learned, read
from qhub.history import Entry, key_of
from qhub.plugins import Plugins
from qhub.prove.report import EstimateResult
from qhub.route.host import detect
from qhub.route.profile import profile
from qhub.types import Estimates, ModelSource, Route, as_json

PLAIN = {"weight_bytes": 1000, "peak_bytes": 5000, "disk_bytes": 7000, "seconds": None}


@pytest.fixture
def small(llama):
    return profile(ModelSource("small", llama(), ""), Plugins.load([]))


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A history that is kept, in a place of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QHUB_NO_HISTORY", raising=False)


def figures(*args):
    return {item.what: item for item in expect(*args)}


def test_without_history_sizes_are_arithmetic_and_the_time_is_unknown(small, remembered):
    found = figures(small, RECIPE, PLAIN, "auto")
    assert {name: item.value for name, item in found.items()} == {"weight_bytes": 1000, "peak_bytes": 5000, "seconds": None}
    assert found["seconds"].basis == "unknown before a first run on this machine"
    assert found["seconds"].plain == sum(layer.shape[0] * layer.shape[1] for layer in small.linears()) * (64 * 512 + 1)


def test_earlier_runs_correct_memory_and_tell_the_time_but_not_the_size(small, remembered):
    plain = figures(small, RECIPE, PLAIN, "auto")
    here, key = history.machine(), plain["peak_bytes"].key
    work = plain["seconds"].plain
    took = (("peak_bytes", 5000, 4000), ("weight_bytes", 1000, 4000), ("seconds", work, 20.0), ("seconds", work / 2, 11.0))
    history.record([Entry(here, what, key, estimated, measured) for what, estimated, measured in took])
    found = figures(small, RECIPE, PLAIN, "auto")
    assert (found["weight_bytes"].value, found["peak_bytes"].value) == (1000, 4000)
    assert found["peak_bytes"].basis == "corrected by 1 earlier run on this machine"
    assert found["seconds"].value == pytest.approx(21.0)
    assert found["seconds"].basis == "from 2 earlier runs on this machine"
    assert {name: item.plain for name, item in found.items()} == {name: item.plain for name, item in plain.items()}


@pytest.mark.parametrize(
    ("recipe", "device"),
    [
        (replace(RECIPE, method="awq"), "auto"),
        (replace(RECIPE, scheme="w8a16"), "auto"),
        (replace(RECIPE, calibration=None), "auto"),
        (replace(RECIPE, options={"gptq": {"damping": 0.1}}), "auto"),
        (RECIPE, "cuda"),
        (RECIPE, "auto bounded"),
    ],
    ids=["another method", "another scheme", "no calibration", "other options", "another device", "a bound"],
)
def test_runs_of_another_kind_do_not_correct(small, remembered, recipe, device):
    for item in expect(small, RECIPE, PLAIN, "auto"):
        history.record([Entry(history.machine(), item.what, item.key, item.plain, item.plain / 2)])
    assert figures(small, RECIPE, PLAIN, "auto")["peak_bytes"].value == 2500
    assert figures(small, recipe, PLAIN, device)["peak_bytes"].value == 5000
    assert figures(small, recipe, PLAIN, device)["seconds"].value is None


def test_without_an_accelerator_automatic_is_the_processor():
    assert engine_of("auto", bounded=False) == ("auto" if detect().accelerators else "cpu")
    assert engine_of("cuda", bounded=False) == "cuda"
    assert engine_of("cpu", bounded=True) == "cpu bounded"


def test_who_wants_no_history_gets_plain_estimates(small, remembered, monkeypatch):
    for item in expect(small, RECIPE, PLAIN, "auto"):
        history.record([Entry(history.machine(), item.what, item.key, item.plain, item.plain / 2)])
    monkeypatch.setenv("QHUB_NO_HISTORY", "1")
    assert figures(small, RECIPE, PLAIN, "auto")["peak_bytes"].value == 5000


def test_speed_is_expected_only_where_this_machine_decodes():
    route = Route("host", "gptq", "weight-only", "w4a16-g32-asym", "gptq", "hf", "hf", estimates=Estimates(1000, 2000, 12.5, basis="why"))
    (found,) = expect_speed(RECIPE, route)
    assert (found.what, found.value, found.basis) == ("tokens_per_s", 12.5, "why")
    assert expect_speed(replace(RECIPE, target="apple-m1"), route) == ()
    assert expect_speed(replace(RECIPE, runtime=None), route) == ()
    assert expect_speed(RECIPE, replace(route, estimates=Estimates())) == ()


def test_what_is_learned_is_the_plain_estimate_beside_the_measurement_and_only_what_was_measured():
    expected = [Expectation(what, 1.0, 2.0, "key", "basis") for what in ("weight_bytes", "peak_bytes", "seconds", "tokens_per_s")]
    measured = {"weight_bytes": 5.0, "peak_bytes": 6, "seconds": 7.0, "tokens_per_s": None}
    report = replace(REPORT, estimate={name: EstimateResult(1.0, value) for name, value in measured.items()})
    here = history.machine()
    assert learned(report, expected) == (Entry(here, "peak_bytes", "key", 2.0, 6.0), Entry(here, "seconds", "key", 2.0, 7.0))
    assert learned(replace(REPORT, estimate={}), expected) == ()


def test_expectations_survive_the_file_between_the_processes_of_a_run(small):
    expected = expect(small, RECIPE, PLAIN, "cpu")
    assert read(json.loads(json.dumps(as_json(expected)))) == expected
    assert expected[0].key == key_of("gptq", "w4a16-g32-asym", "cpu", 2 * (12288 + 24576), 64 * 512)
