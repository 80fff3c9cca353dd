"""The sentence from a model to its report: what a plan decides, what a run leaves behind, what `eval` measures."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from forked import needs_plugins, run
from tiny_models import random_ids, tiny_model

from qhub import pipeline
from qhub.errors import Unsupported, UsageError
from qhub.events import Events
from qhub.plugins import Plugins
from qhub.prove.report import load
from qhub.quantize.store import QuantizedWeights, folder_digest
from qhub.route.recipe import from_yaml, to_yaml
from qhub.skeleton import FloatWeights
from qhub.types import Scheme

pytestmark = needs_plugins
ARTIFACT = "artifact/compressed-tensors"


def loaded(*names):
    """Those of qhub's own plugins."""
    return Plugins.load([point for point in metadata.entry_points(group="qhub") if point.name in names])


@pytest.fixture(scope="module")
def plugins():
    """All but the demo, whose texts would be there for every model."""
    return loaded("awq", "gptq", "hf", "rtn")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """60 windows of 64 random characters."""
    path = tmp_path_factory.mktemp("text") / "random.txt"
    path.write_text("".join(map(chr, (random_ids(60, 64) % 95 + 32).flatten().tolist())), encoding="utf-8")
    return path


def request_for(text, out, **more):
    settings = {"plugins": ("gptq", "hf"), "scheme": "w4a16-g32-asym", "samples": 8, "seq_len": 64, "device": "cpu", **more}
    return pipeline.RunRequest(model=str(tiny_model("llama")), calib=str(text), eval=str(text), out=out, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory, plugins, text):
    """(plan, report) of one finished run."""
    plan = pipeline.plan(request_for(text, tmp_path_factory.mktemp("runs") / "run"), plugins)
    return plan, pipeline.run(plan, plugins, Events())


# The plan


def test_a_plan_decides_from_headers_and_writes_nothing(plugins, text, tmp_path):
    plan = pipeline.plan(request_for(text, tmp_path / "run"), plugins)
    recipe = plan.recipe
    assert (recipe.method, recipe.scheme, recipe.target) == ("gptq", "w4a16-g32-asym", "host")
    assert (recipe.exporter, recipe.runtime) == ("hf", "hf")
    assert Path(recipe.model_path) == tiny_model("llama")
    assert (recipe.calibration.data, recipe.calibration.samples, recipe.calibration.seq_len) == (str(text), 8, 64)
    assert (recipe.evaluation.data, recipe.evaluation.samples, recipe.evaluation.seq_len) == (str(text), 60, 64)
    assert {"torch", "transformers", "qhub-gptq", "qhub-hf"} <= set(recipe.versions)
    assert recipe.overrides == {}
    assert not list(tmp_path.iterdir())


def test_its_size_is_that_of_the_result(done):
    plan, report = done
    assert plan.estimate["weight_bytes"] == pytest.approx(report.quantized.bytes, rel=0.15)  # float32 scales, shapes, headers
    assert plan.estimate["peak_bytes"] > plan.estimate["weight_bytes"]
    assert plan.estimate["disk_bytes"] > plan.estimate["weight_bytes"]


def test_a_method_without_data_gets_no_calibration_text(plugins, text, tmp_path):
    recipe = pipeline.plan(request_for(text, tmp_path / "run", plugins=("rtn", "hf")), plugins).recipe
    assert recipe.calibration is None
    assert recipe.evaluation is not None


def test_windows_are_no_longer_than_the_models_context(plugins, text, tmp_path):
    recipe = pipeline.plan(request_for(text, tmp_path / "run", seq_len=None, samples=4), plugins).recipe
    assert (recipe.calibration.seq_len, recipe.evaluation.seq_len) == (128, 128)


def test_layers_that_the_group_does_not_divide_stay_float(plugins, text, tmp_path):
    recipe = pipeline.plan(request_for(text, tmp_path / "run", scheme="w4a16-g128-asym"), plugins).recipe
    names = [f"model.layers.{index}.{layer}" for index in (0, 1) for layer in ("self_attn.o_proj", "mlp.up_proj")]
    assert len(recipe.overrides) == 2 * 6  # all but down_proj have 64 inputs
    assert {recipe.overrides[name] for name in names} == {"float"}
    with pytest.raises(Unsupported, match="group size `256` divides no layer"):
        pipeline.plan(request_for(text, tmp_path / "run", scheme="w4a16-g256-asym"), plugins)


def test_without_an_exporter_the_quantized_model_is_the_result(text, tmp_path):
    """The target's exporter is not installed: the run ends with what it has, and says which plugin would finish it."""
    some = loaded("gptq")
    plan = pipeline.plan(request_for(text, tmp_path / "run", plugins=("gptq",), target="apple-m1"), some)
    assert (plan.recipe.exporter, plan.recipe.runtime) == (None, None)
    assert "would finish it on `apple-m1`" in plan.finish
    report = pipeline.run(plan, some, Events())
    assert report.artifacts == ()
    assert (tmp_path / "run" / "quantized" / "config.json").exists()
    assert any("nothing ran on `apple-m1`" in row for row in report.not_checked)


def test_a_directory_is_found_where_none_is_given(plugins, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{tiny_model('llama').name}-gptq-host"
    assert pipeline.plan(request_for(text, None), plugins).out == Path("runs") / name
    (tmp_path / "runs" / name).mkdir(parents=True)
    assert pipeline.plan(request_for(text, None), plugins).out == Path("runs") / f"{name}-2"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("down_proj", "`--override down_proj` is not PATTERN=SCHEME"),
        ("=float", "`--override =float` is not PATTERN=SCHEME"),
        ("down_proj=int4", "unknown scheme `int4`"),
        ("nothing=float", "override `nothing=float` matches no layer of `llama-float32`"),
    ],
)
def test_an_override_that_means_nothing_is_refused(plugins, text, tmp_path, override, message):
    with pytest.raises(UsageError) as error:
        pipeline.plan(request_for(text, tmp_path / "run", overrides=(override,)), plugins)
    assert error.value.message == message
    assert error.value.hint


# The run


def test_a_run_leaves_exactly_what_it_says(done):
    plan, _ = done
    assert {path.name for path in plan.out.iterdir()} == {
        "recipe.yaml", "quantized", "artifact", "report.json", "report.html", "events.jsonl", "state.json"
    }  # fmt: skip
    assert [path.name for path in (plan.out / "artifact").iterdir()] == ["compressed-tensors"]
    state = json.loads((plan.out / "state.json").read_text())
    assert state["done"] == ["quantize", "export", "verify", "evaluate", "report"]
    assert from_yaml((plan.out / "recipe.yaml").read_text()) == plan.recipe


def test_its_report_holds_what_was_measured(done):
    plan, report = done
    assert load(plan.out) == report
    assert (report.method, report.scheme, report.target) == ("gptq", "w4a16-g32-asym", "host")
    assert report.quantized.kl < report.baseline.kl
    assert report.targets.met == (report.quantized.drop_pct <= 2)
    (artifact,) = report.artifacts
    assert (artifact.path, artifact.format) == (ARTIFACT, "compressed-tensors")
    assert (artifact.bytes, artifact.sha256) == folder_digest(plan.out / ARTIFACT)
    assert artifact.parity.codes_identical
    assert [stage.name for stage in report.stages] == ["quantize", "export", "verify", "evaluate"]
    assert sum(report.bytes_by_class.values()) <= report.quantized.bytes
    assert "<html" in (plan.out / "report.html").read_text()


def test_its_events_tell_stages_and_blocks_in_order(done):
    plan, _ = done
    log = [json.loads(line) for line in (plan.out / "events.jsonl").read_text().splitlines()]
    stages = [(event["name"], event["state"]) for event in log if event["event"] == "stage"]
    names = ("quantize", "export", "verify", "evaluate", "report")
    assert stages == [(name, state) for name in names for state in ("start", "end")]
    blocks = [event for event in log if event["event"] == "block" and event["stage"] == "quantize"]
    assert [(event["index"], event["count"], event["name"]) for event in blocks] == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert all(0 < event["error"] < 1 for event in blocks)
    assert json.loads((plan.out / "report.json").read_text())["block_errors"] == [event["error"] for event in blocks]


def test_overrides_reach_the_artifact(plugins, text, tmp_path):
    """The last pattern that matches decides."""
    overrides = ("*.0.*=w8a16-g64-asym", "down_proj=w3a16-g32-sym", "o_proj=float")
    plan = pipeline.plan(request_for(text, tmp_path / "run", overrides=overrides), plugins)
    report = pipeline.run(plan, plugins, Events())
    weights, original = QuantizedWeights(tmp_path / "run" / ARTIFACT), FloatWeights(tiny_model("llama"))
    schemes = {name.removeprefix("model.layers."): str(scheme) for name, scheme in weights.schemes.items()}
    assert schemes["0.mlp.up_proj"] == schemes["0.self_attn.v_proj"] == "w8a16-g64-asym"
    assert schemes["0.mlp.down_proj"] == schemes["1.mlp.down_proj"] == "w3a16-g32-sym"
    assert schemes["1.mlp.up_proj"] == "w4a16-g32-asym"
    assert len(schemes) == 12
    output = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(weights.read(output), original.read(output))
    assert report.artifacts[0].parity.max_abs_diff <= 1e-5
    bits = {name: Scheme.parse(text).bits_per_weight for name, text in schemes.items()}
    assert min(bits.values()) < report.quantized.bits_per_weight < max(bits.values())


def test_rounding_to_nearest_is_not_compared_with_itself(plugins, text, tmp_path):
    plan = pipeline.plan(request_for(text, tmp_path / "run", plugins=("rtn", "hf")), plugins)
    assert pipeline.run(plan, plugins, Events()).baseline is None


def test_a_recipe_repeats_its_run_bit_for_bit(done, plugins, tmp_path):
    plan, report = done
    again = pipeline.plan(pipeline.RunRequest(recipe=plan.out / "recipe.yaml", out=tmp_path / "again", device="cpu"), plugins)
    assert again.recipe == plan.recipe
    repeated = pipeline.run(again, plugins, Events())
    assert repeated.artifacts[0].sha256 == report.artifacts[0].sha256
    assert repeated.recipe_digest == report.recipe_digest
    assert repeated.quantized == report.quantized


# Evaluation


@pytest.mark.parametrize("part", ["", "quantized", ARTIFACT], ids=["run", "QuantizedModel", "artifact"])
def test_eval_finds_again_what_the_report_says(done, plugins, part):
    plan, report = done
    found = pipeline.evaluate(plan.out / part, plugins, Events(), None)
    for name in ("accuracy", "perplexity", "kl", "top1_agreement", "drop_pct"):
        assert found[name] == pytest.approx(getattr(report.quantized, name), rel=1e-9), name
    assert found["float"] == {"accuracy": report.float_model.accuracy, "perplexity": report.float_model.perplexity}
    assert (found["windows"], found["seq_len"], found["stride"]) == (60, 64, 63)
    assert found["metric"] == "next_token_accuracy"


def test_eval_of_a_float_folder_has_no_divergence(done, plugins, text):
    _, report = done
    found = pipeline.evaluate(tiny_model("llama"), plugins, Events(), str(text))
    assert (found["kl"], found["top1_agreement"]) == (None, None)
    assert found["seq_len"] == 128  # the model's context
    assert found["perplexity"] == pytest.approx(report.float_model.perplexity, rel=0.2)
    assert "float" not in found


def test_eval_without_the_float_model_measures_the_rest(done, plugins, tmp_path):
    plan, report = done
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "quantized").symlink_to(plan.out / "quantized")
    recipe = replace(plan.recipe, model_path=str(tmp_path / "gone"))
    (copy / "recipe.yaml").write_text(to_yaml(recipe))
    found = pipeline.evaluate(copy, plugins, Events(), None)
    assert found["perplexity"] == pytest.approx(report.quantized.perplexity, rel=1e-6)
    assert (found["kl"], found["top1_agreement"]) == (None, None)


# The command line


def test_run_and_eval_say_the_same_on_the_command_line(text, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    texts = ["--calib", text, "--eval", text, "--samples", 8, "--seq-len", 64, "--device", "cpu"]
    ran = run(["run", tiny_model("llama"), "--plugin", "awq", "--scheme", "w4a16-g32-asym", *texts, "--out", "out", "--json"], here)
    report = json.loads(ran.out)
    assert ran.code == (0 if report["targets"]["met"] else 5), ran.err
    assert (report["method"], report["artifacts"][0]["parity"]["codes_identical"]) == ("awq", True)
    assert "Traceback" not in ran.err
    measured = run(["eval", "out", "--json"], here)
    found = json.loads(measured.out)
    assert (measured.code, found["kl"]) == (0, pytest.approx(report["quantized"]["kl"], rel=1e-9))
