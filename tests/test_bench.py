"""What is measured is what an engine does: counted by a toy engine that takes known times, and by real ones on a tiny model."""

from __future__ import annotations

import json
import os
import time

import pytest

from qhub.events import Events
from qhub.interfaces import Runtime
from qhub.prove import bench
from qhub.prove.bench import Job, measure, measure_apart
from qhub.prove.energy import Counter, counters, joules
from qhub.types import OpenOptions, as_json

JOB = Job("nowhere", "toy", OpenOptions(threads=2), (3, 10), generate=5, rounds=2, vocabulary=7)


class Toy(Runtime):
    """A token takes 2 ms, one of a prompt 0.5 ms."""

    name = "toy"

    def __init__(self, tokens=1000):
        self.calls, self.tokens, self.closed = [], tokens, False

    def open(self, path, options):
        self.options = options
        return self

    def generate(self, ids, max_new_tokens, *, until_stop):
        assert not until_stop
        self.calls.append((list(ids), max_new_tokens))
        time.sleep(0.0005 * len(ids))
        for count in range(min(max_new_tokens, self.tokens)):
            time.sleep(0.002 if count else 0)
            yield 1

    def close(self):
        self.closed = True


class Telling(Toy):
    """It also says what it reads."""

    bytes_per_token, how_loaded = 1000, "packed"

    ops_per_token, peak = 500, 1e9

    def bandwidth(self, threads):
        self.asked = threads
        return 1e6

    def peak_ops(self, threads):
        assert threads == self.asked
        return self.peak


def test_rates_are_those_of_the_engine():
    toy = Toy()
    found = measure(toy, JOB, Events())
    assert [prompt["tokens"] for prompt in found["prompt"]] == [3, 10]
    for figures, most in ((found["prompt"][0], 2000), (found["prompt"][1], 2000), (found["generate"], 500)):
        assert most / 10 < figures["min"] <= figures["tokens_per_s"] <= figures["max"] <= most
    assert found["prompt_tokens_per_s"] == found["prompt"][1]["tokens_per_s"]
    assert found["generate_tokens_per_s"] == found["generate"]["tokens_per_s"]
    assert 2 <= found["latency_ms"]["p50"] <= found["latency_ms"]["p90"] <= found["latency_ms"]["p99"]
    assert (found["threads"], found["exact"], found["kernel"], found["batch"]) == (2, False, None, 1)
    assert (found["bandwidth_share"], found["compute_share"], found["how_loaded"], found["float"]) == (None, None, None, None)
    assert found["load_s"] < 1
    assert found["peak_rss_bytes"] > 1 << 20
    assert (toy.options, toy.closed) == (JOB.options, True)


def test_a_round_is_warmed_up_and_starts_from_the_same_random_tokens():
    toy = Toy()
    measure(toy, JOB, Events())
    assert [(len(ids), count) for ids, count in toy.calls] == [(3, 1)] * 3 + [(10, 1)] * 3 + [(1, 4)] + [(1, 6)] * 2
    assert all(0 <= token < 7 for ids, _ in toy.calls for token in ids)
    again = Toy()
    measure(again, JOB, Events())
    assert again.calls == toy.calls


def test_the_share_of_the_bandwidth_is_bytes_per_second_over_what_memory_gives():
    engine = Telling()
    found = measure(engine, JOB, Events())
    assert found["bandwidth_share"] == pytest.approx(1000 * found["generate_tokens_per_s"] / 1e6)
    assert (engine.asked, found["how_loaded"]) == (2, "packed")


def test_the_share_of_the_arithmetic_is_that_of_the_longest_prompt():
    found = measure(Telling(), JOB, Events())
    assert found["compute_share"] == pytest.approx(500 * found["prompt_tokens_per_s"] / 1e9)


def test_a_peak_that_is_not_known_gives_no_share():
    engine = Telling()
    engine.peak = None
    assert measure(engine, JOB, Events())["compute_share"] is None


@pytest.mark.parametrize(("tokens", "message"), [(0, "it gave no token for a prompt of `3`"), (3, "it gave `3` of 6 tokens")])
def test_an_engine_that_stops_early_is_an_error_and_closed(tokens, message):
    toy = Toy(tokens)
    with pytest.raises(bench.QhubError, match=message):
        measure(toy, JOB, Events())
    assert toy.closed


def test_a_job_survives_json():
    assert Job.from_json(json.dumps(as_json(JOB))) == JOB


ENGINES = """
import os, time
from qhub import QhubError, Runtime, Unsupported, hookimpl

class Base(Runtime):
    summary = "a toy"
    distribution = "qhub-toys"
    formats = ("compressed-tensors",)

    def open(self, path, options):
        print("spoken past everything")
        os.write(1, b"and past Python\\n")
        return self

    def generate(self, ids, max_new_tokens, *, until_stop=True, temperature=0.0, top_p=1.0, seed=0):
        for _ in range(max_new_tokens):
            time.sleep(0.0001)
            yield 1

    def close(self):
        pass

class Works(Base):
    name = "works"

class Refuses(Base):
    name = "refuses"

    def open(self, path, options):
        raise Unsupported("`refuses` does not run `toy` models", hint="qhub bench DIR --runtime works")

class Crashes(Base):
    name = "zz-crashes"

    def open(self, path, options):
        raise RuntimeError("no such accelerator")

class Dies(Base):
    name = "zz-dies"

    def open(self, path, options):
        os.kill(os.getpid(), 9)

class Sleeps(Base):
    name = "zz-sleeps"

    def open(self, path, options):
        (path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

class Elsewhere(Base):
    name = "zz-elsewhere"

    def reject(self, target):
        return "it runs on the moon"

@hookimpl
def qhub_runtimes():
    return [Works(), Refuses(), Crashes(), Dies(), Sleeps(), Elsewhere()]
"""


@pytest.fixture
def toys(toy_plugin, tmp_path):
    """Toy engines, and a model whose context has room for 200 tokens."""
    (tmp_path / "model").mkdir()
    config = {"vocab_size": 50, "max_position_embeddings": 200, "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return toy_plugin("toys", ENGINES)


QUICK = ("--rounds", 1, "--generate", 4)


def test_a_fresh_process_measures_and_tells_its_stages(toys, tmp_path, monkeypatch):
    for name, value in toys.items():
        monkeypatch.setenv(name, value)
    heard = []
    job = Job(str(tmp_path / "model"), "works", OpenOptions(1), (8,), generate=3, rounds=1, vocabulary=50)
    found = measure_apart(job, Events(listener=heard.append))
    assert (found["runtime"], found["threads"], found["prompt"][0]["tokens"]) == ("works", 1, 8)
    assert found["peak_rss_bytes"] < 150e6  # not what the tests' process holds
    assert [(event["name"], event["state"]) for event in heard] == [
        (name, state) for name in ("open", "prompt of 8", "generate 3") for state in ("start", "end")
    ]


def test_bench_prints_one_document(qhub, toys):
    ran = qhub("bench", "model", "--runtime", "works", "--threads", 1, "--threads", 2, "--prompt", 16, "--json", *QUICK, env=toys)
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert (document["artifact"], sorted(document)) == ("model", ["artifact", "host", "runs"])
    assert [(run["runtime"], run["threads"], run["generate"]["tokens"]) for run in document["runs"]] == [("works", 1, 4), ("works", 2, 4)]
    fields = (
        "batch energy_j exact float generate generate_tokens_per_s how_loaded items_per_s kernel latency_ms load_s peak_rss_bytes prompt"
    )
    assert sorted(document["runs"][0]) == sorted(
        [*fields.split(), "prompt_tokens_per_s", "runtime", "threads", "bandwidth_share", "compute_share"]
    )
    assert "spoken" not in ran.out
    assert "2 threads: prompt of 16  …\n" in ran.err


def test_bench_prints_a_table(qhub, toys):
    ran = qhub("bench", "model", "--runtime", "works", "--threads", 1, "--prompt", 16, *QUICK, env=toys)
    assert ran.code == 0, ran.err
    named = [line.split("  ")[0] for line in ran.out.splitlines()]
    assert named == [
        "model", "", "works", "load", "prompt of 16, tokens/s", "generate 4, tokens/s", "ms per token, p50", "ms per token, p90",
        "ms per token, p99", "peak memory", "share of the memory bandwidth", "share of the int8 peak", "joules per token",
    ]  # fmt: skip
    assert ran.out.count("not measured") in (2, 3)  # where RAPL can be read there are joules


def test_an_engine_that_refuses_is_followed_by_the_next(qhub, toys):
    ran = qhub("bench", "model", "--threads", 1, "--prompt", 4, "--json", *QUICK, env=toys)
    assert (ran.code, json.loads(ran.out)["runs"][0]["runtime"]) == (0, "works")
    assert "warning: `refuses` does not run `toy` models; taking `works`\n" in ran.err


def test_prompts_that_the_context_has_no_room_for_are_left_out_and_said(qhub, toys):
    ran = qhub("bench", "model", "--runtime", "works", "--threads", 1, "--rounds", 1, "--generate", 300, "--json", env=toys)
    run = json.loads(ran.out)["runs"][0]
    assert ([prompt["tokens"] for prompt in run["prompt"]], run["generate"]["tokens"]) == ([128], 199)
    assert "no prompt of 512 tokens: the model's context is 200\n" in ran.err
    assert "199 tokens are generated, not 300: the model's context is 200\n" in ran.err


CASES = {
    "an unknown engine": (("--runtime", "wroks"), 2, "error: unknown runtime `wroks`\n\nhint: did you mean `works`? known: "),
    "one of another machine": (("--runtime", "zz-elsewhere"), 3, "error: `zz-elsewhere` does not work here: it runs on the moon\n"),
    "one that refuses, named": (("--runtime", "refuses"), 3, "error: `refuses` does not run `toy` models\n\nhint: qhub bench DIR"),
    "one that crashes": (("--runtime", "zz-crashes"), 4, "error: `zz-crashes` failed: RuntimeError: no such accelerator\n"),
    "one that is killed": (("--runtime", "zz-dies"), 4, "error: `zz-dies` was killed by signal 9 while it was measured\n"),
    "a prompt that is too long": (("--prompt", 201), 2, "error: a prompt of `201` tokens does not fit the model's context of 200\n"),
    "no thread": (("--threads", 0), 2, "error: invalid value for `--threads`"),
}


@pytest.mark.parametrize(("options", "code", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_measured_is_an_error(qhub, toys, options, code, message):
    ran = qhub("bench", "model", *QUICK, *options, env=toys)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_ctrl_c_ends_the_measurement_and_its_process(toys, tmp_path):
    terminal = pytest.importorskip("terminal")
    pid = tmp_path / "model" / "pid"
    with terminal.Terminal(["bench", "model", "--runtime", "zz-sleeps"], tmp_path, toys) as opened:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        opened.type(terminal.CTRL_C)
        code, seen = opened.end()
    assert code == 130
    assert seen.endswith("interrupted: nothing was left half written\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_no_engine_at_all_is_no_route(qhub, toys):
    ran = qhub("bench", "model")
    assert (ran.code, ran.err) == (3, "error: no runtime works here: none is installed\n\nhint: `pip install qhub-hf`\n")


def test_a_folder_that_is_not_there_or_no_model(qhub, toys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert qhub("bench", "nowhere", env=toys).err.startswith("error: `nowhere` does not exist\n")
    assert qhub("bench", "empty", env=toys).err.startswith("error: `empty` is not a model folder: it has no config.json\n")


def zone(root, name, value, limit=1000):
    (root / name).mkdir(parents=True)
    (root / name / "energy_uj").write_text(f"{value}\n")
    (root / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_energy_is_that_of_the_packages_not_of_their_parts(tmp_path):
    assert counters(tmp_path) == {}
    for name, value in (("intel-rapl:0", 5), ("intel-rapl:0:0", 3), ("intel-rapl:1", 7), ("intel-rapl-mmio:0", 9)):
        zone(tmp_path, name, value)
    assert counters(tmp_path) == {"intel-rapl:0": Counter(5, 1000), "intel-rapl:1": Counter(7, 1000)}
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("secret")
    assert counters(tmp_path) == {}


def test_a_counter_that_starts_again_is_understood():
    before = {"a": Counter(900_000, 1_000_000), "b": Counter(0, 1_000_000)}
    assert joules(before, {"a": Counter(100_000, 1_000_000), "b": Counter(300_000, 1_000_000)}) == pytest.approx(0.5)
    assert joules({}, {}) is None
    assert joules(before, {"a": Counter(100_000, 1_000_000)}) is None
