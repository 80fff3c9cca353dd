"""Plugins in environments of their own: found without starting them, run by their interpreter, and nothing of them outlives a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from forked import Ran, needs_plugins, run, start
from tiny_models import tiny_model
from toy_whole import ROOT, is_running, make_environment, pids

from qhub.errors import PluginError, QhubError, UsageError
from qhub.isolation.ask import ask
from qhub.isolation.conflicts import read_conflicts
from qhub.isolation.environments import Environment, Lock, data_dir, environment, environments_dir, find_environments, locked_versions
from qhub.isolation.group import Limits, run_group
from qhub.isolation.install import CONSTRAINTS, Asked, install, pins_of, remove, requirements_of
from qhub.isolation.proxies import home_of
from qhub.plugins import Plugins, PluginWarning
from qhub.route.recipe import from_yaml
from qhub.types import ModelProfile, Scheme

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data directory with the environment `toy`."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QHUB_DATA_DIR", str(folder))
        make_environment()
    return folder


@pytest.fixture
def toy(data, monkeypatch) -> Environment:
    """The environment `toy`, the only plugin there is."""
    monkeypatch.setenv("QHUB_DATA_DIR", str(data))
    monkeypatch.setenv("QHUB_PLUGINS", "toy")
    return environment("toy")


# Where environments are.


@pytest.mark.parametrize(
    ("variables", "platform", "expected"),
    [
        ({"QHUB_DATA_DIR": "/a/b"}, "linux", "/a/b"),
        ({"XDG_DATA_HOME": "/x"}, "linux", "/x/qhub"),
        ({}, "linux", "/home/me/.local/share/qhub"),
        ({"XDG_DATA_HOME": "/x"}, "darwin", "/home/me/Library/Application Support/qhub"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/qhub"),
    ],
    ids=["chosen", "XDG", "Linux", "macOS", "Windows"],
)
def test_data_lies_where_the_system_keeps_it(monkeypatch, variables, platform, expected):
    for name in ("QHUB_DATA_DIR", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert data_dir() == Path(expected)


@pytest.mark.parametrize("name", ["", "..", "a/b", "Toy", ".hidden", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(UsageError, match="is no name of a plugin"):
        environment(name)


def test_only_complete_environments_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path))
    assert find_environments() == []
    for name, files in (("whole", ["lock.json"]), ("begun", []), ("killed", ["lock.json", ".partial"]), (".hidden", ["lock.json"])):
        (environments_dir() / name).mkdir(parents=True)
        for file in files:
            (environments_dir() / name / file).touch()
    assert [one.name for one in find_environments()] == ["whole"]


def test_inside_an_environment_there_are_none(toy, monkeypatch):
    assert [one.name for one in find_environments()] == ["toy"]
    monkeypatch.setattr(sys, "prefix", str(toy.folder))
    assert find_environments() == []


def test_the_lock_holds_exact_versions_and_what_was_asked(toy):
    lock = toy.lock
    assert lock.packages["qhub-toy"] == "1.5"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lock.packages["numpy"])
    assert lock.asked == ("qhub-toy", f"-e {ROOT}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", lock.created)
    assert lock.python == ".".join(map(str, sys.version_info[:3]))
    written = json.loads((toy.folder / "lock.json").read_text())
    assert (written["digest"], written["asked_sha256"]) == (lock.digest, lock.asked_sha256)


def test_the_digest_of_a_lock_does_not_depend_on_when_it_was_made(toy):
    lock = toy.lock
    assert replace(lock, created="another day").digest == lock.digest
    assert replace(lock, packages={**lock.packages, "numpy": "0.1"}).digest != lock.digest
    assert replace(lock, asked=("another",)).digest != lock.digest


def test_versions_of_other_environments_have_their_name_in_front(toy):
    assert locked_versions(["toy/qhub-toy", "toy/nothing", "nowhere/numpy", "numpy"]) == {"toy/qhub-toy": "1.5"}


# What Plugins knows of them.


def test_a_plugin_elsewhere_is_listed_like_any_other(toy):
    plugins = Plugins.load()
    (info,) = plugins.infos
    assert (info.name, info.distribution, info.version, info.error) == ("toy", "qhub-toy", "1.5", None)
    assert info.environment == toy.folder
    assert plugins.components_of("toy") == {"quantizers": ["toy-whole"], "exporters": [], "runtimes": []}
    method = plugins.quantizers["toy-whole"]
    assert (method.summary, method.family, method.whole, method.options) == (
        "rounds to nearest, all at once",
        "weight-only",
        True,
        {"bias": 0},
    )
    assert home_of(method).name == "toy"


def test_what_it_refuses_is_known_without_asking_it(toy):
    method = Plugins.load().quantizers["toy-whole"]
    profile = ModelProfile("a", "", "llm", "LlamaForCausalLM", 1, "bf16", 1)
    assert method.reject(profile, Scheme.parse("w4a16-g64-asym")) is None
    assert method.reject(profile, Scheme.parse("w8a8-static")) == "`toy-whole` does not write scheme `w8a8-static`"


def test_options_are_checked_here(toy):
    with pytest.raises(UsageError, match="quantizer `toy-whole` has no option `bais`"):
        type(Plugins.load().quantizers["toy-whole"])(bais=1)


def test_listing_starts_no_process_and_is_fast(toy, qhub):
    trap = "import sys, subprocess; sys.addaudithook(lambda event, _: event in ('subprocess.Popen', 'os.fork') and sys.exit(9)); "
    ran = qhub(command=("-c", trap + "from qhub.cli import main; sys.exit(main(['plugins', '--json']))"), env={"QHUB_PLUGINS": "toy"})
    assert (ran.code, ran.err) == (0, "")
    assert [row["name"] for row in json.loads(ran.out)["plugins"]] == ["toy"]


HERE = """
from qhub import Quantizer, hookimpl

class Here(Quantizer):
    name = "here"

@hookimpl
def qhub_quantizers():
    return [Here()]
"""


def test_a_plugin_that_also_works_here_is_used_here(toy, toy_plugin, monkeypatch):
    env = toy_plugin("toy", HERE)
    monkeypatch.syspath_prepend(env["PYTHONPATH"].split(os.pathsep)[1])
    with pytest.warns(PluginWarning, match=r"plugin `toy` is installed here and in `.*`: the one here is used"):
        assert list(Plugins.load().quantizers) == ["here"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "declarations.json").write_text("{"), r"`.*declarations.json` is damaged"),
        (lambda folder: (folder / "declarations.json").unlink(), r"`.*declarations.json` is missing"),
        (lambda folder: (folder / "lock.json").write_text("[]"), r"`.*lock.json` is damaged"),
        (lambda folder: (folder / "lock.json").write_text('{"python": 3}'), r"`.*lock.json` is damaged"),
        (lambda folder: (folder / "bin" / "python").unlink(), r"`.*python` is gone"),
        (
            lambda folder: (folder / "lock.json").write_text((folder / "lock.json").read_text().replace("1.5", "1.6")),
            r"`.*declarations.json` belongs to another installation than `lock.json`",
        ),
    ],
    ids=["declarations damaged", "declarations gone", "lock no object", "lock without packages", "interpreter gone", "another lock"],
)
def test_a_damaged_environment_is_a_warning_that_says_how_to_mend_it(tmp_path, monkeypatch, damage, message):
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("QHUB_PLUGINS", "toy")
    damage(make_environment().folder)
    with pytest.warns(PluginWarning, match=f"plugin `toy` in an environment of its own was left out: {message}") as caught:
        plugins = Plugins.load()
    assert "`qhub plugins uninstall toy && qhub plugins install toy --isolated`" in str(caught[0].message)
    assert plugins.infos[0].error is not None
    with pytest.raises(PluginError, match="plugin `toy` of `toy` is broken"):
        plugins.components_of("toy")


def test_disabled_plugins_are_left_alone(toy, monkeypatch):
    monkeypatch.setenv("QHUB_DISABLED_PLUGINS", "toy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Plugins.load().infos == []


# Asking.


def test_an_environment_that_does_not_answer_in_time_is_an_error(toy):
    with pytest.raises(PluginError, match=r"`toy` did not answer `packages` within 0\.01 s"):
        ask(toy, ["packages"], timeout_s=0.01)


def test_an_error_of_the_worker_is_passed_on(toy):
    with pytest.raises(PluginError, match="`toy` failed to answer `declare`: no plugin `other` was installed"):
        ask(toy, ["declare", "other"])


# Installing.


def test_torch_is_held_to_the_range_that_is_tested():
    assert f'"{CONSTRAINTS[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_from_a_checkout_core_and_plugin_are_installed_as_they_lie_there():
    assert requirements_of(str(ROOT / "plugins" / "rtn")) == (f"-e {ROOT / 'plugins' / 'rtn'}", f"-e {ROOT}")
    assert requirements_of("qhub-other>=2") == ("qhub-other>=2", f"-e {ROOT}")


@pytest.mark.parametrize(
    ("plugin", "pinned"),
    [
        ("qhub-toy", ["numpy==2.1.0", "qhub-toy==1.5", "toy==3.0"]),
        ("/wheels/qhub_toy-1.5-py3-none-any.whl", ["numpy==2.1.0", "qhub-toy==1.5", "toy==3.0"]),
        ("-e /checkout/plugins/toy", ["numpy==2.1.0", "toy==3.0"]),
        ("/mine/qhub-toy", ["numpy==2.1.0", "toy==3.0"]),
    ],
    ids=["from the index", "a wheel", "of the checkout", "a folder"],
)
def test_a_lock_holds_all_but_what_comes_from_a_folder(plugin, pinned):
    packages = {"numpy": "2.1.0", "qhub-core": "0.1.0", "qhub-toy": "1.5", "toy": "3.0"}  # `toy` is the tool that the plugin wraps
    assert pins_of(Lock("3.12.1", "a day", (plugin,), packages), (plugin, "-e /checkout")) == pinned


def test_an_installation_from_a_lock_holds_the_installer_to_it(tmp_path, monkeypatch):
    """Without an index nothing can be had; what the installer is given is there while it is told."""
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    given: list[str] = []

    def say(text: str) -> None:
        if "--constraint" in text:
            given.append(Path(text.partition("--constraint ")[2].split()[0]).read_text())

    with pytest.raises(PluginError, match="`toy` could not be installed"):
        install(Asked("toy", "qhub-toy", Lock("3.12.1", "a day", ("qhub-toy",), {"qhub-core": "0.1", "qhub-toy": "1.4"})), say)
    assert given == ["qhub-toy==1.4\n"]
    assert find_environments() == []


def test_what_cannot_be_installed_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said: list[str] = []
    with pytest.raises(PluginError, match=r"`nothing` could not be installed: Could not find a version") as error:
        install(Asked("nothing", "qhub-nothing"), said.append)
    assert "pip install --dry-run" in error.value.hint
    assert said[0] == f"making `{environments_dir() / 'nothing'}`"
    assert [path.name for path in environments_dir().iterdir()] == [".nothing.lock"]


BACKEND = """
import os, time
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    Path(os.environ["TOY_PIDS"]).write_text(str(os.getpid()))
    time.sleep(600)

build_wheel = build_editable = prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
"""
INSTALL = """
import sys
from qhub.errors import QhubError
from qhub.isolation.install import Asked, install
install(Asked("slow", sys.argv[1]), print)
"""


@LINUX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "kill -9"])
def test_an_interrupted_installation_leaves_no_process_and_is_begun_anew(tmp_path, monkeypatch, number):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (slow / "backend.py").write_text(BACKEND)
    env = {**os.environ, "QHUB_DATA_DIR": str(tmp_path / "data"), "TOY_PIDS": str(tmp_path / "pids"), "PYTHONPATH": str(ROOT)}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", INSTALL, str(slow)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: pids(tmp_path / "pids"))
        process.send_signal(number)
        process.wait(20)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(map(is_running, pids(tmp_path / "pids"))))
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path / "data"))
    assert find_environments() == []
    left = environment("slow").folder.exists()
    assert left == (number != signal.SIGINT)  # a killed process cannot tidy up; the next installation does
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said: list[str] = []
    with pytest.raises(PluginError):
        install(Asked("slow", "qhub-slow"), said.append)
    assert any("interrupted installation" in text for text in said) == left


def test_two_installations_of_one_plugin_do_not_meet(toy):
    with pytest.raises(UsageError, match=r"plugin `toy` already has an environment, of \d{4}-") as error:
        install(Asked("toy", "qhub-toy"), print)
    assert error.value.hint == "`qhub plugins uninstall toy` removes it"


def test_removing_takes_all_of_it_away(tmp_path, monkeypatch):
    monkeypatch.setenv("QHUB_DATA_DIR", str(tmp_path))
    make_environment()
    assert remove("toy").name == "toy"
    assert find_environments() == []
    assert not environment("toy").folder.exists()
    with pytest.raises(UsageError, match="plugin `toy` has no environment of its own"):
        remove("toy")


CONFLICT = """
ERROR: Cannot install llmcompressor==0.14.0.1 and transformers==5.23.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    llmcompressor 0.14.0.1 depends on transformers<=5.17.0 and >=5.15.0
    The user requested (constraint) transformers==5.23.0

To fix this you could try to:
1. loosen the range of package versions you've specified
"""


def test_a_conflict_is_told_in_the_words_of_both_sides():
    rules = ["llmcompressor 0.14.0.1 depends on transformers<=5.17.0 and >=5.15.0", "transformers 5.23.0 is installed here"]
    assert read_conflicts(CONFLICT) == rules
    assert read_conflicts(CONFLICT.partition("The conflict")[0])[0].startswith("Cannot install llmcompressor==0.14.0.1 and")
    assert read_conflicts("ERROR: No matching distribution found for nothing") == []


# A command in a group of its own.


def wait_until(is_so, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.02)


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_lines_come_one_by_one_and_stderr_goes_to_the_log(tmp_path):
    lines: list[str] = []
    ended = run_group(
        python("import sys; print('a'); print('b'); print('c', file=sys.stderr); sys.exit(3)"), lines.append, tmp_path / "log"
    )
    assert (ended.code, ended.over, ended.signal, lines) == (3, None, None, ["a", "b"])
    assert (tmp_path / "log").read_text() == "c\n"


def test_python_variables_of_this_environment_do_not_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TOY", "kept")
    lines: list[str] = []
    run_group(python("import os; print(os.environ.get('PYTHONPATH'), os.environ['TOY'])"), lines.append, tmp_path / "log")
    assert lines == ["None kept"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_that_ended_it_is_told(tmp_path, number):
    ended = run_group(python(f"import os; os.kill(os.getpid(), {int(number)})"), print, tmp_path / "log")
    assert ended.signal is number


@LINUX
@pytest.mark.parametrize(
    ("limits", "over"), [(Limits(seconds=1.0), "time"), (Limits(memory_bytes=200 << 20), "memory")], ids=["time", "memory"]
)
def test_over_a_limit_all_of_the_group_is_ended(tmp_path, limits, over):
    grow = "held = []\nfor _ in range(12): held.append(bytearray(os.urandom(1 << 20)) * 64); time.sleep(0.1)\n"
    source = f"import os, subprocess, sys, time\np = subprocess.Popen(['sleep', '600'])\nprint(os.getpid(), p.pid)\n{grow}time.sleep(600)"
    lines: list[str] = []
    ended = run_group(python(source), lines.append, tmp_path / "log", limits)
    assert ended.over == over
    wait_until(lambda: not any(is_running(int(pid)) for pid in lines[0].split()))


@LINUX
def test_what_it_leaves_running_is_ended_too(tmp_path):
    source = "import subprocess; print(subprocess.Popen(['sleep', '600'], process_group=0).pid)"
    if sys.version_info < (3, 11):
        source = "import os, subprocess; print(subprocess.Popen(['sleep', '600'], preexec_fn=os.setpgrp).pid)"
    lines: list[str] = []
    assert run_group(python(source), lines.append, tmp_path / "log").code == 0
    wait_until(lambda: not is_running(int(lines[0])))


# Stages.

pytestmark = needs_plugins


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model and a text."""
    import shutil

    folder = tmp_path_factory.mktemp("stages") / "here"
    folder.mkdir()
    shutil.copytree(tiny_model("llama"), folder / "model")
    (folder / "text.txt").write_text("".join(f"{number} cats sat on {number * number} mats; " for number in range(200)), encoding="utf-8")
    return folder


@pytest.fixture
def env(data, tmp_path) -> dict[str, str]:
    """In what `qhub` runs: the toy elsewhere, the rest here."""
    return {"QHUB_DATA_DIR": str(data), "QHUB_PLUGINS": "toy,rtn,gptq,hf", "TOY_PIDS": str(tmp_path / "pids")}


def command(out: str, *more: str, method: str = "toy-whole") -> list[str]:
    sizes = ("--samples", "8", "--seq-len", "32", "--scheme", "w4a16-g32-asym", "--device", "cpu")
    return ["run", "model", "--plugin", method, "--calib", "text.txt", "--eval", "text.txt", *sizes, "--out", out, *more]


def error_of(ran: Ran) -> str:
    return ran.err[ran.err.index("error: ") :].splitlines()[0]


def test_a_whole_model_method_elsewhere_gives_what_the_same_method_gives_here(place, env):
    apart, here = run(command("apart"), place, env=env), run(command("rtn", method="rtn"), place, env=env)
    assert (apart.code, here.code) in ((0, 0), (5, 5)), apart.err + here.err
    reports = [json.loads((place / name / "report.json").read_text()) for name in ("apart", "rtn")]
    # the toy rounds between minimum and maximum, as the baseline does
    assert reports[0]["quantized"]["perplexity"] == pytest.approx(reports[0]["baseline"]["perplexity"], rel=1e-3)
    assert reports[0]["artifacts"][0]["parity"]["codes_identical"] is True
    assert [stage["name"] for stage in reports[0]["stages"]] == ["quantize", "export", "verify", "evaluate"]
    assert "quantize  block 2/2" in apart.err
    assert "holds the whole model in memory" in apart.err
    recipe = from_yaml((place / "apart" / "recipe.yaml").read_text())
    assert recipe.versions["toy/numpy"]
    assert not (place / "apart" / "work").exists()


def test_a_recipe_made_elsewhere_is_repeated_there(place, env):
    first = run(command("first"), place, env=env)
    again = run(["run", "--recipe", "first/recipe.yaml", "--out", "again"], place, env=env)
    assert first.code == again.code, again.err
    shards = sorted(path.name for path in (place / "first" / "quantized").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (place / "first" / "quantized" / name).read_bytes() == (place / "again" / "quantized" / name).read_bytes()


def test_what_it_prints_beside_its_events_disturbs_nobody(place, env):
    ran = run(command("printing", "--json"), place, env={**env, "TOY": "print"})
    assert ran.code in (0, 5), ran.err
    assert json.loads(ran.out)["method"] == "toy-whole"


@pytest.mark.parametrize(
    ("mood", "code", "message"),
    [
        ("fail", 4, "error: stage `quantize` failed in `toy-whole`: ValueError: the toy is broken"),
        ("die", 4, "error: stage `quantize` of `toy` was killed by signal 9 (SIGKILL)"),
        ("leave", 4, "error: stage `quantize` of `toy` ended with exit code `7`: Fatal: the toy left"),
    ],
    ids=["it raises", "it is killed", "it leaves"],
)
@LINUX
def test_what_fails_elsewhere_is_one_clean_error(place, env, tmp_path, mood, code, message):
    ran = run(command(f"it-{mood}"), place, env={**env, "TOY": mood})
    assert (ran.code, error_of(ran)) == (code, message)
    assert "Traceback" not in ran.err
    assert not (place / f"it-{mood}").exists()
    assert not any(map(is_running, pids(tmp_path / "pids")))


@LINUX
def test_more_memory_than_allowed_ends_it(place, env):
    ran = run(command("eating", "--max-memory", "1.2"), place, env={**env, "TOY": "eat"})
    assert (ran.code, re.sub(r"`[\d.]+` GB", "`N` GB", error_of(ran))) == (
        1,
        "error: stage `quantize` of `toy` took `N` GB of memory, more than the bound of 1.20 GB",
    )


@LINUX
def test_more_time_than_allowed_ends_it(place, env, tmp_path):
    ran = run(command("slow"), place, env={**env, "TOY": "hang", "QHUB_STAGE_TIMEOUT": "8"})
    assert (ran.code, error_of(ran)) == (4, "error: stage `quantize` of `toy` took longer than `8` s, the limit of QHUB_STAGE_TIMEOUT")
    assert not any(map(is_running, pids(tmp_path / "pids")))


def test_a_limit_that_is_no_number_is_refused(place, env):
    ran = run(command("odd"), place, env={**env, "QHUB_STAGE_TIMEOUT": "soon"})
    assert (ran.code, error_of(ran)) == (2, "error: `QHUB_STAGE_TIMEOUT=soon` is not a number of seconds above 0")


@LINUX
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)], ids=["Ctrl-C", "SIGTERM", "kill -9"]
)
def test_however_qhub_ends_no_process_is_left(place, env, tmp_path, number, code):
    out = f"ended-{code}"
    ran = start(command(out), place, env={**env, "TOY": "hang"}).send(number, lambda: len(pids(tmp_path / "pids")) == 2)
    assert ran.code == code
    wait_until(lambda: not any(map(is_running, pids(tmp_path / "pids"))))
    assert not (place / out / "quantized").exists()
    assert not list((place / out).glob("quantized/*"))
    again = run(command(out, *(["--resume"] if (place / out).exists() else [])), place, env=env)
    assert again.code in (0, 5), again.err


@LINUX
def test_its_process_killed_from_outside_is_a_clean_error(place, env, tmp_path):
    started = start(command("shot"), place, env={**env, "TOY": "hang"})
    wait_until(lambda: len(pids(tmp_path / "pids")) == 2)
    os.kill(pids(tmp_path / "pids")[0], signal.SIGKILL)
    ran = started.wait()
    assert (ran.code, error_of(ran)) == (4, "error: stage `quantize` of `toy` was killed by signal 9 (SIGKILL)")
    assert not any(map(is_running, pids(tmp_path / "pids")))


def test_a_model_that_it_refuses_is_refused_before_the_run(place, env, tmp_path):
    import shutil

    other = shutil.copytree(place / "model", tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["ToyForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    ran = run(["run", str(other), *command("no")[2:]], place, env=env)
    assert (ran.code, error_of(ran)) == (3, "error: `toy-whole` does not take `ToyForCausalLM`")


def test_it_combines_with_no_method_that_lives_here(place, env):
    ran = run(command("both", "--plugin", "awq"), place, env={**env, "QHUB_PLUGINS": "toy,awq,hf"})
    assert (ran.code, error_of(ran)) == (2, "error: `awq+toy-whole` cannot be combined: `toy-whole` lives in an environment of its own")


def test_a_lock_is_read_back_as_it_was_written(toy):
    assert Lock.load(toy.folder / "lock.json") == toy.lock
    with pytest.raises(QhubError, match="is missing"):
        Lock.load(toy.folder / "nothing.json")
