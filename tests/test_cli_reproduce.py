"""`qhub reproduce` as a user calls it, and what a run says of earlier ones: exit codes, stdout, stderr."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from forked import PLUGINS, deep, needs_plugins, run, start
from tiny_models import tiny_model

from qhub.cli.reproduce import verdict
from qhub.reproduce import Reproduction, TensorDifference
from qhub.types import Difference

pytestmark = needs_plugins
TEXTS = ("--calib", "text.txt", "--eval", "text.txt", "--samples", "8", "--seq-len", "32", "--max-drop", "100")
TOY = """
from qhub import Quantizer, Scheme, hookimpl, quantize_rtn

class Toy(Quantizer):
    name = "toy"
    distribution = "qhub-toy"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight * 1.0, scheme, block.dtype)

@hookimpl
def qhub_quantizers():
    return [Toy()]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of six blocks, a text, and a finished run `out`."""
    folder = tmp_path_factory.mktemp("reproduce") / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    deep(folder / "model")
    (folder / "text.txt").write_text("".join(f"{number} cats sat on {number * number} mats; " for number in range(200)), encoding="utf-8")
    ran = run(["run", "deep", "--plugin", "gptq", "--scheme", "w4a16-g32-asym", *TEXTS, "--out", "out"], folder)
    assert ran.code == 0, ran.err
    return folder


def test_the_same_is_one_line_on_stdout_and_exit_code_0(place: Path):
    ran = run(["reproduce", "out", "--out", "same"], place)
    assert ran.code == 0, ran.err
    assert re.fullmatch(r"same: \d+ files, \d+ tensors, \d+ metrics\n", ran.out)
    assert ran.err.startswith("model: deep: ")
    assert ran.err.endswith("files: same\n")
    assert "compare  block 7/7" in ran.err
    assert "warning" not in ran.err


def test_what_differs_is_a_table_and_exit_code_1(place: Path):
    shutil.copytree(place / "out", place / "edited")
    path = place / "edited" / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    ran = run(["reproduce", "edited", "--out", "of-edited"], place)
    lines = ran.out.splitlines()
    assert ran.code == 1
    assert lines[0].split() == ["what", "name", "recorded", "now"]
    assert re.fullmatch(r"recipe +recipe\.yaml +[0-9a-f]{12} +[0-9a-f]{12}", lines[1])
    assert re.fullmatch(r"… +\d+ more: `--json` names all", lines[31])
    assert re.fullmatch(
        r"differs: 1 recipe, \d+ files, 1 artifact, \d+ metrics, \d+ layers; versions and hardware are as recorded", lines[-1]
    )


def test_json_is_one_document_with_all_that_differs(place: Path):
    shutil.copytree(place / "out", place / "damaged")
    (place / "damaged" / "quantized" / "tokenizer.json").unlink()
    ran = run(["reproduce", "damaged", "--out", "of-damaged", "--json"], place)
    found = json.loads(ran.out)
    assert ran.code == 1
    assert set(found) == {"run", "repeat", "same", "differences", "layers", "circumstances", "compared"}
    assert [(item["kind"], item["name"], item["recorded"]) for item in found["differences"]] == [
        ("file", "quantized/tokenizer.json", "absent")
    ]


def test_another_source_is_said_before_any_work_begins(place: Path):
    shutil.copytree(place / "deep", place / "other")
    config = place / "other" / "config.json"
    config.write_text(config.read_text() + " ")
    ran = run(["reproduce", "out", "--model", "other", "--out", "of-other"], place)
    assert (ran.code, ran.err) == (1, "")
    assert re.search(r"^source +.*other +[0-9a-f]{12} +[0-9a-f]{12}$", ran.out, re.MULTILINE)
    assert ran.out.endswith("\n\ndiffers: 1 source; nothing was repeated, since it would start from something else\n")
    assert not (place / "of-other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_after_an_interruption_the_same_command_goes_on(place: Path, number: signal.Signals):
    command = ["reproduce", "out"]
    noted = place / "out-repeat" / "work" / "block-00001.json"
    ran = start(command, place).send(number, noted.exists)
    if number == signal.SIGINT:
        assert (ran.code, ran.out) == (130, "")
        assert ran.err.splitlines()[-1] == "interrupted: `qhub reproduce out --out out-repeat` continues where it stopped"
    ran = run(command, place)
    assert (ran.code, ran.out.partition(":")[0]) == (0, "same"), ran.err
    assert "quantize  block 1/" not in ran.err
    shutil.rmtree(place / "out-repeat")


def test_what_is_no_run_is_one_error(place: Path):
    for name, code, error in (("model", 1, "error: `model` has no report.json"), ("gone", 2, "error: invalid value for `RUN`")):
        ran = run(["reproduce", name], place)
        assert (ran.code, ran.out) == (code, "")
        assert ran.err.startswith(error)


def test_another_version_of_a_plugin_is_named_and_may_be_why(place: Path, toy_plugin):
    env = toy_plugin("toy", TOY)
    folder = Path(env["PYTHONPATH"].rpartition(":")[2])
    env["QHUB_PLUGINS"] = ",".join((*PLUGINS, "toy"))
    ran = run(["run", "model", "--plugin", "toy", "--scheme", "w4a16-g32-asym", *TEXTS, "--out", "toy"], place, env=env)
    assert ran.code == 0, ran.err
    assert "  qhub-toy: '1.0'\n" in (place / "toy" / "recipe.yaml").read_text()

    (folder / "qhub_toy-1.0.dist-info").rename(folder / "qhub_toy-1.1.dist-info")
    metadata = folder / "qhub_toy-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    ran = run(["reproduce", "toy"], place, env=env)
    assert ran.code == 0, ran.err
    assert re.search(r"^version +qhub-toy +1\.0 +1\.1$", ran.out, re.MULTILINE)
    assert ran.out.endswith("; versions are not as recorded, which made no difference\n")
    warning = "warning: not all is as `toy/recipe.yaml` was written with, so bytes may differ: qhub-toy 1.0 → 1.1"
    assert ran.err.splitlines().count(warning) == 1

    source = folder / "qhub_toy_toy.py"
    source.write_text(source.read_text().replace("weight * 1.0", "weight * 1.5"))
    ran = run(["reproduce", "toy", "--json"], place, env=env)
    found = json.loads(ran.out)
    assert (ran.code, found["same"]) == (1, False)
    assert {row["part"] for row in found["layers"]} >= {"scales"}
    assert len({row["layer"] for row in found["layers"]}) == 14
    assert verdict_of(found).endswith("; versions are not as recorded, which may be why")


def verdict_of(found: dict) -> str:
    parts = {"differences": Difference, "circumstances": Difference, "layers": TensorDifference}
    return verdict(Reproduction(**{**found, **{name: tuple(kind(**row) for row in found[name]) for name, kind in parts.items()}}))


# `qhub run --recipe`: the same checks, before a run


def test_run_from_a_recipe_warns_of_other_versions_and_pins_the_present_ones(place: Path):
    path = place / "old.yaml"
    path.write_text(re.sub(r"numpy: .*", "numpy: 0.1.0", (place / "out" / "recipe.yaml").read_text()))
    ran = run(["run", "--recipe", "old.yaml", "--out", "of-old"], place)
    assert ran.code == 0, ran.err
    assert ran.err.count("warning: not all is as `old.yaml` was written with, so bytes may differ: numpy 0.1.0 → ") == 1
    assert "numpy: 0.1.0\n" not in (place / "of-old" / "recipe.yaml").read_text()


def test_a_recipe_from_another_machine_says_what_is_not_here_and_takes_it_from_where_the_user_says(place: Path):
    recipe = (place / "out" / "recipe.yaml").read_text().replace(str(place), "/another/machine")
    (place / "foreign.yaml").write_text(recipe)
    ran = run(["run", "--recipe", "foreign.yaml", "--out", "foreign"], place)
    assert (ran.code, ran.out) == (1, "")
    hint = "say where it is: `qhub run MODEL --recipe foreign.yaml`"
    assert ran.err == f"error: the model of `foreign.yaml` is no longer at `/another/machine/deep`\n\nhint: {hint}\n"
    ran = run(["run", "deep", "--recipe", "foreign.yaml", "--out", "foreign"], place)
    assert ran.err == "error: data file `/another/machine/text.txt` does not exist\n\nhint: say where it is: `--calib TEXT`\n"
    ran = run(["run", "deep", "--recipe", "foreign.yaml", "--calib", "model/config.json", "--eval", "text.txt"], place)
    assert "config.json` is not" in ran.err
    ran = run(["run", "deep", "--recipe", "foreign.yaml", "--calib", "text.txt", "--eval", "text.txt", "--out", "foreign"], place)
    assert ran.code == 0, ran.err
    for name in sorted(path.name for path in (place / "out" / "quantized").iterdir()):
        assert (place / "foreign" / "quantized" / name).read_bytes() == (place / "out" / "quantized" / name).read_bytes()


# What a run says of earlier runs on this machine


def test_the_second_run_is_told_by_the_first_and_its_recipe_and_bytes_are_not(place: Path, tmp_path: Path):
    command = ["run", "deep", "--plugin", "gptq", "--scheme", "w4a16-g32-asym", *TEXTS]
    env = {"QHUB_NO_HISTORY": "", "XDG_CACHE_HOME": str(tmp_path)}
    first, second = (run([*command, "--out", name], place, env=env) for name in ("first", "second"))
    assert (first.code, second.code) == (0, 0)
    assert "corrected" not in first.err
    assert "\ntime: " not in first.err
    assert re.search(r"^needs: [\d.]+ MB memory \(corrected by 1 earlier run on this machine\), ", second.err, re.MULTILINE)
    assert re.search(r"^time: about .* to quantize \(from 1 earlier run on this machine\)$", second.err, re.MULTILINE)
    table = second.out.partition("estimated and measured\n\n")[2].splitlines()[:4]
    rows = ("size of the weights", "memory while quantizing", "time to quantize")
    assert [line.startswith(row) for line, row in zip(table[1:], rows, strict=True)] == [True] * 3
    estimate = json.loads((place / "second" / "report.json").read_text())["estimate"]
    assert set(estimate) >= {"weight_bytes", "peak_bytes", "seconds"}
    assert estimate["peak_bytes"]["ratio"] == estimate["peak_bytes"]["measured"] / estimate["peak_bytes"]["estimated"]
    for name in ("recipe.yaml", "quantized/qhub.json", "quantized/model-00003-of-00007.safetensors"):
        assert (place / "first" / name).read_bytes() == (place / "second" / name).read_bytes() == (place / "out" / name).read_bytes()
    assert len((tmp_path / "qhub" / "history.jsonl").read_text().splitlines()) == 4


def test_a_run_that_was_interrupted_is_not_compared_and_teaches_nothing(place: Path, tmp_path: Path):
    env = {"QHUB_NO_HISTORY": "", "XDG_CACHE_HOME": str(tmp_path)}
    command = ["run", "deep", "--plugin", "gptq", "--scheme", "w4a16-g32-asym", *TEXTS, "--out", "stopped"]
    assert run(command, place, env=env, die_at="block-00003.json").code == -9
    assert run(["run", "--resume", "--out", "stopped"], place, env=env).code == 0
    estimate = json.loads((place / "stopped" / "report.json").read_text())["estimate"]
    assert estimate["weight_bytes"]["measured"] is not None
    assert [estimate[name]["measured"] for name in ("peak_bytes", "seconds")] == [None, None]
    assert not (tmp_path / "qhub" / "history.jsonl").exists()
