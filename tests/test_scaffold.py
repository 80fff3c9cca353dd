"""`qhub plugins new`: complete packages that pass ruff and their own tests; names that no distribution can have are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qhub.errors import UsageError
from qhub.scaffold.write import KINDS, LICENSES, NewPlugin, check_name, write_plugin

ROOT = Path(__file__).parent.parent
FILES = {".github/workflows/test.yml", ".gitignore", "LICENSE", "README.md", "pyproject.toml", "tests/test_plugin.py"}
LONGEST = "a-name-as-long-as-a-plugin-name-may-be-x"


def run_in(folder, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q", "acme-int3", "8bit", LONGEST])
def test_what_is_written_is_complete_and_passes_ruff_whatever_its_name(tmp_path, kind, name):
    files = {str(file.relative_to(tmp_path / f"qhub-{name}")) for file in write_plugin(NewPlugin(name, kind), tmp_path)}
    module = f"qhub_{name.replace('-', '_')}"
    assert files >= FILES | {f"{module}/__init__.py", f"{module}/plugin.py"}
    folder = tmp_path / f"qhub-{name}"
    assert not [file for file in folder.rglob("*") if file.is_file() and "%%" in file.read_text(encoding="utf-8")]
    run_in(folder, "-m", "ruff", "check", "--no-cache", ".")
    run_in(folder, "-m", "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.parametrize("kind", ["exporter", "runtime"])  # the quantizer's are run by the tutorial's test
def test_it_passes_its_own_tests(tmp_path, kind):
    write_plugin(NewPlugin("acme", kind), tmp_path)
    assert " passed in " in run_in(tmp_path / "qhub-acme", "-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("chosen", LICENSES)
def test_the_license_is_the_one_that_was_chosen(tmp_path, chosen):
    write_plugin(NewPlugin("acme", "exporter", chosen, "Ada Lovelace"), tmp_path)
    project = (tmp_path / "qhub-acme" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{chosen}"' in project
    assert 'authors = [{ name = "Ada Lovelace" }]' in project
    text = (tmp_path / "qhub-acme" / "LICENSE").read_text(encoding="utf-8")
    assert {"Apache-2.0": "Apache License", "MIT": "MIT License", "BSD-3-Clause": "BSD 3-Clause License"}[chosen] in text
    assert ("Ada Lovelace" in text) == (chosen != "Apache-2.0")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("Acme_Int3", "`Acme_Int3` is no plugin name: lower-case letters and digits, in words joined by `-`", "try `acme-int3`"),
        ("acme--int3", "`acme--int3` is no plugin name: lower-case letters and digits, in words joined by `-`", "try `acme-int3`"),
        ("../evil", "`../evil` is no plugin name: lower-case letters and digits, in words joined by `-`", "try `evil`"),
        ("", "`` is no plugin name: lower-case letters and digits, in words joined by `-`", "try `my-method`"),
        ("qhub-acme", "`qhub-acme` names the distribution", "leave out the `qhub-`: `acme`"),
        ("awq", "`awq` is the name of plugin `qhub-awq`", "put your own before it: `acme-awq`"),
        ("x" * 41, f"`{'x' * 41}` has 41 letters; a plugin name has at most 40", f"try `{'x' * 12}`"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_one_that_does(name, message, hint):
    with pytest.raises(UsageError) as caught:
        check_name(name, {"awq": "plugin `qhub-awq`"})
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "qhub-acme").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        write_plugin(NewPlugin("acme", "runtime"), tmp_path)
    assert list((tmp_path / "qhub-acme").iterdir()) == []


def test_an_unknown_scheme_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="unknown scheme `int3`"):
        write_plugin(NewPlugin("acme", "quantizer", scheme="int3"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote_and_how_to_go_on(qhub, tmp_path):
    ran = qhub("plugins", "new", "acme-int3", "--kind", "quantizer", "--scheme", "w3-g64-asym")
    assert ran.code == 0
    assert "qhub-acme-int3/qhub_acme_int3/plugin.py" in ran.out.splitlines()
    assert ran.err == "the code is in qhub-acme-int3/qhub_acme_int3; `qhub plugins check ./qhub-acme-int3` checks it\n"
    assert 'default_scheme = "w3a16-g64-asym"' in (tmp_path / "qhub-acme-int3/qhub_acme_int3/plugin.py").read_text(encoding="utf-8")
    ran = qhub("plugins", "new", "acme-int3", "--kind", "exporter")
    assert ran == (2, "", "error: `qhub-acme-int3` already exists\n\nhint: choose another name, or remove it\n")


def test_the_command_tells_programs_the_same(qhub):
    document = json.loads(qhub("plugins", "new", "acme", "--kind", "runtime", "--json").out)
    assert (document["distribution"], document["folder"]) == ("qhub-acme", "qhub-acme")
    assert "qhub-acme/qhub_acme/session.py" in document["files"]


def test_the_name_of_a_known_plugin_is_taken(qhub, tmp_path):
    ran = qhub("plugins", "new", "awq", "--kind", "quantizer")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: `awq` is the name of plugin `qhub-awq`\n")
    assert list(tmp_path.iterdir()) == []


def test_templates_and_the_kit_are_in_the_wheel():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'qhub = ["scaffold/templates/**"]' in project
    assert 'qhub = "qhub.testing.pytest_plugin"' in project
