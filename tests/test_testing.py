"""The conformance kit: good plugins pass, and each kind of fault fails the check that is about it, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import needs_plugins

from qhub import Artifact, Exporter, OpenOptions, QTensor, Quantizer, Runtime, Scheme, folder_digest, quantize_rtn
from qhub.errors import UsageError
from qhub.scaffold.write import NewPlugin, write_plugin
from qhub.testing import ABOUT, FAIL, PASS, SKIP, Check, check_plugin, check_runtime, find_subject, run_checks
from qhub.testing.result import CheckFailedError, CheckSkippedError

ROOT = Path(__file__).parent.parent
PLUGIN = """
from qhub import Exporter, Quantizer, Runtime, hookimpl

class Toy(Quantizer):
    name = "toy"
    summary = "a toy"
    distribution = "qhub-toy"
    requires = ("no_such_sdk",)

@hookimpl
def qhub_quantizers():
    return [Toy()]
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """What the kit says of a plugin of one module in a folder: check → (outcome, reason)."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def check(source):
        folder = tmp_path / "qhub-toy"
        folder.mkdir()
        project = '[project]\nname = "qhub-toy"\n\n[project.entry-points.qhub]\ntoy = "qhub_toy_module"\n'
        (folder / "pyproject.toml").write_text(project, encoding="utf-8")
        (folder / "qhub_toy_module.py").write_text(source, encoding="utf-8")
        return {check.name: (check.outcome, check.reason) for check in run_checks(find_subject(folder))}

    return check


def test_a_good_plugin_whose_sdk_is_missing_is_checked_as_far_as_it_can_be(checked):
    found = checked(PLUGIN)
    work = ("quantizes", "deterministic", "resumable", "clean-errors")
    assert {name: found.pop(name) for name in work} == dict.fromkeys(work, (SKIP, "`no_such_sdk` is not installed here"))
    assert set(found.values()) == {(PASS, "")}
    assert len(found) == 8


# Each row: what is wrong with the plugin · which check fails · its reason.
FAULTS = {
    "a syntax error": (
        lambda text: text.replace("class Toy(", "class Toy(("),
        "entry-point",
        "plugin `toy` of `qhub-toy` is broken: SyntaxError: ",
    ),
    "a misspelt hook": (
        lambda text: text.replace("qhub_quantizers", "qhub_quantisers"),
        "entry-point",
        "plugin `toy` of `qhub-toy` is broken: PluginValidationError: unknown hook 'qhub_quantisers'",
    ),
    "a hook that fails": (
        lambda text: text.replace("return [Toy()]", "return 1 / 0"),
        "entry-point",
        "plugin `toy` of `qhub-toy` failed in `qhub_quantizers`: ZeroDivisionError",
    ),
    "no hook at all": (lambda text: text.partition("@hookimpl")[0], "entry-point", "it has no hook that offers anything"),
    "a heavy import": (lambda text: f"import rich\n{text}", "light-import", "it imports `rich`: do that in the method that works"),
    "a slow import": (lambda text: f"import time\ntime.sleep(1.1)\n{text}", "light-import", "it took 1"),
    "no summary": (lambda text: text.replace('"a toy"', '""'), "declarations", "summary `` is not one line of text"),
    "a bad name": (
        lambda text: text.replace('"toy"', '"To y"'),
        "declarations",
        "name `To y` is not lower case without spaces and `+,/:=`",
    ),
    "another's distribution": (
        lambda text: text.replace('"qhub-toy"', '"qhub-awq"'),
        "declarations",
        "distribution is `qhub-awq`, but `qhub-toy` brings it",
    ),
    "an unknown family": (
        lambda text: text.replace("    requires", '    family = "magic"\n    requires'),
        "declarations",
        "family `magic` is none of qat, weight-only, static, dynamic, float16",
    ),
    "a scheme that is none": (
        lambda text: text.replace("    requires", '    default_scheme = "int3"\n    requires'),
        "declarations",
        "default_scheme: unknown scheme `int3`",
    ),
    "requires that is no tuple": (
        lambda text: text.replace('("no_such_sdk",)', '["no_such_sdk"]'),
        "declarations",
        "requires is ['no_such_sdk'], not a tuple of module names",
    ),
    "a reject that raises": (
        lambda text: text.replace("    requires", "    def reject(self, profile, scheme):\n        raise KeyError('x')\n\n    requires"),
        "reject",
        "KeyError: 'x'",
    ),
    "a reject that says True": (
        lambda text: text.replace("    requires", "    def reject(self, profile, scheme):\n        return True\n\n    requires"),
        "reject",
        "its answer about `w2a16-g64-asym` is True, not a reason or None",
    ),
    "a reject that takes everything": (
        lambda text: text.replace("    requires", "    def reject(self, profile, scheme):\n        return None\n\n    requires"),
        "reject",
        "it takes every scheme, among them w8a8-static, w8a8-dynamic, nf4, fp16, bf16: refuse what the method does not write",
    ),
    "an import of what it requires": (
        lambda text: f"import colorsys\n{text}".replace('("no_such_sdk",)', '("colorsys", "no_such_sdk")'),
        "missing-modules",
        "without `colorsys`, `no_such_sdk` it does not load: ModuleNotFoundError",
    ),
    "a network": (
        lambda text: text.replace("    return [", "    import socket\n    socket.create_connection(('203.0.113.9', 443))\n    return ["),
        "no-network",
        "it tried to reach `203.0.113.9:443`",
    ),
    "a stray file": (
        lambda text: text.replace("    return [", "    open('/tmp/../qhub-stray-file', 'w')\n    return ["),
        "no-stray-files",
        "it tried to write `/qhub-stray-file`",
    ),
    "a greeting": (lambda text: text.replace("    return [", "    print('hello')\n    return ["), "no-output", "it printed `hello`"),
    "a crash": (
        lambda text: text.replace("    return [", "    import os\n    os.abort()\n    return ["),
        "entry-point",
        "the process died with signal 6",
    ),
}


@pytest.mark.parametrize(("change", "name", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_fails_the_check_that_is_about_it(checked, change, name, reason):
    outcome, why = checked(change(PLUGIN))[name]
    assert outcome == FAIL
    assert reason in why
    assert not Path("/qhub-stray-file").exists()


class Toy(Quantizer):
    """A good quantizer, which the faulty ones below derive from."""

    name = "toy"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


class Dice(Toy):
    """Not the same twice."""

    thrown = 0

    def quantize_layer(self, weight, scheme, block):
        Dice.thrown += 1
        found = super().quantize_layer(weight, scheme, block)
        found.codes[0, 0] = Dice.thrown % 4
        return found


class Exact(Toy):
    """Scales that the artifact cannot hold."""

    def quantize_layer(self, weight, scheme, block):
        found = super().quantize_layer(weight, scheme, block)
        return QTensor(found.codes, found.scale * 1.001, found.zero, found.bits, found.symmetric)


class Forgetful(Toy):
    """All weights become what the lowest code stands for."""

    def quantize_layer(self, weight, scheme, block):
        found = super().quantize_layer(weight, scheme, block)
        return QTensor(found.codes * 0, found.scale, found.zero, found.bits, found.symmetric)


@pytest.fixture
def working(monkeypatch, tmp_path):
    """The kit's own functions in this process, for the quantizer that a test sets, and a folder with a tiny model."""
    working = pytest.importorskip("qhub.testing.working")
    from qhub.testing import tiny

    tiny.write_model(tmp_path / "model", Scheme.parse("w4a16-g128-asym"), "bfloat16")
    working.use = lambda quantizer: monkeypatch.setattr(working, "_make", lambda job: quantizer())
    return working


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (Toy, None),
        (Exact, "scale differs from what is stored; scale must be rounded with `round_scale`"),
        (Forgetful, "no better than weights of zero"),
    ],
)
def test_what_a_quantizer_returns_must_be_what_is_stored_and_near_the_model(working, tmp_path, quantizer, reason):
    working.use(quantizer)
    if reason is None:
        working._quantizes(None, tmp_path / "model", tmp_path / "first")
        return
    with pytest.raises(CheckFailedError, match=reason):
        working._quantizes(None, tmp_path / "model", tmp_path / "first")


def test_a_method_that_throws_dice_is_not_deterministic(working, tmp_path):
    working.use(Dice)
    working._run(Dice(), tmp_path / "model", tmp_path / "first")
    with pytest.raises(CheckFailedError, match=r"`model-0000[0-9]-of-00004.safetensors` is not the same"):
        working._deterministic(None, tmp_path / "model", tmp_path)


def test_weights_with_nan_must_end_in_an_error(working, tmp_path):
    working.use(Toy)
    working._clean_errors(None, tmp_path / "model", tmp_path)


class Copy(Exporter):
    """Writes two files; the faulty ones below derive from it."""

    name, format = "toy", "toy"
    lie: dict = {}  # noqa: RUF012 - what the artifact says instead of the truth

    def export(self, model, out, recipe):
        for path in model.path.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        size_bytes, digest = folder_digest(out)
        return Artifact(**{"path": out, "format": "toy", "bytes": size_bytes, "sha256": digest, **self.lie})


class Nothing(Copy):
    """Writes no file."""

    def export(self, model, out, recipe):
        return Artifact(out, "toy", 0, folder_digest(out)[1])


class Meddler(Copy):
    """Changes the model that it exports."""

    def export(self, model, out, recipe):
        artifact = super().export(model, out, recipe)
        (model.path / "extra").write_text("x")
        return artifact


@pytest.mark.parametrize(
    ("exporter", "lie", "reason"),
    [
        (Copy, {"format": "other"}, "the artifact says format `other`, the exporter `toy`"),
        (Copy, {"bytes": 7}, "the artifact says 7 bytes, there are "),
        (Copy, {"sha256": "0"}, "the artifact's sha256 is not"),
        (Copy, {"path": Path("/tmp")}, "the artifact's path `/tmp` is not in `out`"),
        (Nothing, {}, "it wrote nothing"),
        (Meddler, {}, "it changed the model that it was given"),
    ],
    ids=["format", "bytes", "sha256", "path", "nothing", "meddles"],
)
def test_an_exporter_that_says_what_is_not_so_fails(working, tmp_path, monkeypatch, exporter, lie, reason):
    working._run(Toy(), tmp_path / "model", tmp_path / "quantized")
    monkeypatch.setattr(Copy, "lie", lie)
    with pytest.raises(CheckFailedError, match=reason):
        working._export(exporter(), tmp_path, "artifact")


def test_codes_that_are_not_the_models_are_found(working, tmp_path):
    working._run(Toy(), tmp_path / "model", tmp_path / "quantized")
    folder = tmp_path / "quantized" / "model"
    good = {name: working.QuantizedWeights(folder).layer(name) for name in working.QuantizedWeights(folder).schemes}

    class Reader(Exporter):
        layers = good

        def read_layers(self, path):
            return self.layers

    working._exact(Reader(), folder, folder)
    name = min(good)
    bent = QTensor(good[name].codes ^ 1, good[name].scale, good[name].zero, good[name].bits, good[name].symmetric)
    Reader.layers = {**good, name: bent}
    with pytest.raises(CheckFailedError, match=f"`{name}`: codes differs from what is stored"):
        working._exact(Reader(), folder, folder)
    Reader.layers = {key: tensor for key, tensor in good.items() if key != name}
    with pytest.raises(CheckFailedError, match=f"layers differ: `{name}`"):
        working._exact(Reader(), folder, folder)
    Reader.layers = None
    working._exact(Reader(), folder, folder)  # the folder itself can be read
    with pytest.raises(CheckSkippedError, match="only a runtime of this format can tell"):
        working._exact(Reader(), folder, tmp_path)


class Engine(Runtime):
    """Computes logits of nothing; `said` is what it generates."""

    name, formats, said = "toy", ("toy",), [5, 5, 5, 5]

    def open(self, path, options):
        self.options = options
        return self

    def logits(self, ids):
        found = np.zeros((*ids.shape, 128), dtype=np.float32)
        found[..., 5] = 1
        return found

    def generate(self, ids, max_new_tokens, *, temperature=0.0, top_p=1.0, seed=0, until_stop=True):
        assert not until_stop  # how many tokens there are is then known
        yield from self.said

    def close(self):
        pass


def test_generated_tokens_must_be_those_that_the_logits_say(working, tmp_path):
    engine = Engine()
    working._generates(engine, tmp_path)
    assert engine.options == OpenOptions(threads=1)
    Engine.said = [5]
    with pytest.raises(CheckFailedError, match="asked to go on past stop tokens it generated 1 of 4 tokens"):
        working._generates(Engine(), tmp_path)
    Engine.said = [5, 5, 5, 6]
    with pytest.raises(CheckFailedError, match=r"it generated \[5, 5, 5, 6\] where its own logits say \[5, 5, 5, 5\]"):
        working._generates(Engine(), tmp_path)


@needs_plugins
@pytest.mark.parametrize("name", ["awq", "gptq", "hf"])
def test_our_own_plugins_conform(name):
    assert not [check for check in check_plugin(name) if check.outcome == SKIP]


def test_a_check_says_what_it_is_about():
    assert Check("reject", "plugin", PASS).about == ABOUT["reject"]


def test_who_fails_raises_with_every_reason_and_who_lacks_a_kind_too(tmp_path, monkeypatch):
    monkeypatch.setattr("qhub.testing.run_checks", lambda subject: [Check("reject", "quantizer x", FAIL, "it raises")])
    write_plugin(NewPlugin("x", "quantizer"), tmp_path)
    with pytest.raises(AssertionError, match=r"^reject \(quantizer x\): it raises$"):
        check_plugin(tmp_path / "qhub-x")
    monkeypatch.setattr("qhub.testing.run_checks", lambda subject: [Check("reject", "quantizer x", PASS)])
    with pytest.raises(AssertionError, match=r"^the plugin offers no runtime$"):
        check_runtime(tmp_path / "qhub-x")


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (None, "is not a plugin's folder: it has no pyproject.toml"),
        ("[project]\nname = 'x'\n", "has 0 entry points"),
        ("[project.entry-points.qhub]\na = 'b'\n", "has no project name"),
        ("[project]\nname = 'x'\n[project.entry-points.qhub]\na = 'b'\nc = 'd'\n", "has 2 entry points"),
    ],
)
def test_a_folder_that_is_no_plugin_is_a_usage_error(tmp_path, project, message):
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        find_subject(tmp_path)


def test_an_unknown_name_is_a_usage_error():
    with pytest.raises(UsageError, match="no plugin `no-such` is installed"):
        find_subject("no-such")


def test_pytest_runs_the_checks_as_tests_when_it_is_asked(tmp_path):
    folder = tmp_path / "qhub-toy"
    folder.mkdir()
    project = '[project]\nname = "qhub-toy"\n\n[project.entry-points.qhub]\ntoy = "qhub_toy_module"\n\n[tool.pytest.ini_options]\n'
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "qhub_toy_module.py").write_text(PLUGIN.replace('"a toy"', '""'), encoding="utf-8")
    (folder / "test_it.py").write_text("def test_it(qhub_check):\n    assert callable(qhub_check)\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    installed = any("qhub.testing.pytest_plugin" in point.value for point in entry_points())
    command += [] if installed else ["-p", "qhub.testing.pytest_plugin"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    ran = subprocess.run([*command, "--qhub-check"], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert "1 failed, 8 passed, 8 skipped" in ran.stdout, ran.stdout + ran.stderr
    assert "FAILED qhub-check::declarations - Failed: quantizer toy: summary `` is not one line of text" in ran.stdout
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert "1 passed" in ran.stdout


def entry_points():
    from importlib import metadata

    return metadata.entry_points(group="pytest11")
