"""The tutorial is run as it is written; what hooks.md and plugins.md say is what the code says."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qhub import hookspecs
from qhub.testing import ABOUT

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
#: What the reader's own environment does after `pip install`, without the network: the wheel that was just built, unpacked.
UNPACK = (
    "python -m pip install --quiet --no-index --no-deps --target ../installed dist/*.whl\nexport PYTHONPATH=$PYTHONPATH:$PWD/../installed\n"
)


@pytest.fixture
def place(tmp_path):
    """An empty folder, and an environment in which `qhub` and `python` are the ones under test; nothing comes from the network."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, command in (("qhub", "-m qhub"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n', encoding="ascii")
        (tools / name).chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_CACHE_DIR": "1", "OMP_NUM_THREADS": "1"}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return here, {**os.environ, **offline, "PATH": path, "PYTHONPATH": str(ROOT), "QHUB_PLUGINS": "acme-int3,rtn,hf,demo"}


def test_the_tutorial_works_as_it_is_written(place):
    pytest.importorskip("pip")
    here, env = place
    blocks = [UNPACK + text if mark == "installed" else text for _, mark, text in BLOCKS if mark != "network"]
    if not {"qhub_demo", "qhub_hf"} <= {path.name for path in (ROOT / "plugins").glob("*/qhub_*")}:
        pytest.skip("needs the plugins demo and hf")
    script = "set -euo pipefail\n" + "\n".join(blocks)
    ran = subprocess.run(["bash", "-c", script], cwd=here, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len(re.findall(r"\d+ passed in ", ran.stdout)) == 2
    assert "All checks passed!" in ran.stdout
    assert "all 12 checks passed or were skipped" in ran.stderr
    assert "route  acme-int3 for host: w3a16" in ran.stdout
    assert [path.name for path in (here / "qhub-acme-int3" / "dist").iterdir()] == ["qhub_acme_int3-0.1.0-py3-none-any.whl"]


@pytest.mark.parametrize("block", [text for _, mark, text in BLOCKS if mark == "network"])
def test_what_needs_the_network_is_at_least_a_valid_script(block):
    subprocess.run(["bash", "-n", "-c", block], check=True)


def test_every_block_is_run_or_marked():
    assert {language for language, _, _ in BLOCKS} == {"bash"}
    assert {mark for _, mark, _ in BLOCKS} == {"", "network", "installed"}


@pytest.mark.parametrize("name", [name for name in vars(hookspecs) if name.startswith("qhub_")])
def test_hooks_md_says_when_each_hook_is_called(name):
    when = re.search(r"Called [^.]+(?:`\.yaml`)?[^.]*\.", inspect.getdoc(getattr(hookspecs, name)))
    section = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8").partition(f"## `{name}(")[2].partition("\n## ")[0]
    assert when, name
    assert when[0].split(",")[0].rstrip(".") in section.replace("that the core", "the core")


def test_plugins_md_lists_every_check_with_what_it_shows():
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", text, flags=re.MULTILINE) == list(ABOUT.items())
