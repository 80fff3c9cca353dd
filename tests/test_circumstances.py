"""Versions and hardware: recorded, compared, and put in words."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

from qhub.plugins import Plugins, PluginWarning
from qhub.route.circumstances import changes, distributions, hardware, in_words, installed, threads, versions
from qhub.types import Difference, Recipe


def recipe(**recorded: dict[str, str]) -> Recipe:
    return Recipe("m", "m", "", "host", "rtn", "w8a16", **recorded)


def test_versions_are_those_that_are_installed():
    found = versions(["pytest", "no-such-distribution", "pytest"])
    assert found == {"python": platform.python_version(), "pytest": metadata.version("pytest")}


def test_a_run_depends_on_its_libraries_and_plugins():
    assert set(installed(["pytest"])) >= {"python", "numpy", "safetensors", "pytest"}


def test_hardware_is_what_can_change_the_last_bits():
    found = hardware()
    assert set(found) == {"cpu", "isa", "threads", "os", "accelerators"}
    assert all(isinstance(text, str) and text for text in found.values())


@pytest.mark.parametrize(
    ("said", "expected"), [("3", 3), ("4,2", 4), (" 1 ", 1), ("0", None), ("many", None), ("", None)], ids=lambda value: repr(value)
)
def test_threads_are_what_the_environment_says_else_the_cores(monkeypatch, said, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    cores = threads()
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads() == (expected or cores)


def test_where_nothing_changed_there_are_no_changes():
    assert changes(recipe(versions=installed([]), hardware=hardware())) == ()
    assert changes(recipe()) == ()


def test_each_change_is_named_with_both_values():
    old = recipe(versions={"python": "2.7.18", "gone": "1.0"}, hardware={**hardware(), "cpu": "an abacus"})
    assert changes(old) == (
        Difference("version", "python", "2.7.18", platform.python_version()),
        Difference("version", "gone", "1.0", "none"),
        Difference("hardware", "cpu", "an abacus", hardware()["cpu"]),
    )
    assert in_words(changes(old)[1:2]) == "gone 1.0 → none"


def test_what_a_recipe_does_not_record_is_not_compared():
    assert changes(recipe(hardware={"os": hardware()["os"]})) == ()


TOY = """
from qhub import Quantizer, hookimpl

class Toy(Quantizer):
    name = "{name}"

@hookimpl
def qhub_quantizers():
    {work}
    return [Toy()]
"""


def test_a_distribution_is_found_by_what_its_plugin_offers(toy_plugin, monkeypatch):
    toy_plugin("one", TOY.format(name="toy-a", work=""))
    toy_plugin("two", TOY.format(name="toy-b", work=""))
    env = toy_plugin("three", TOY.format(name="toy-c", work="raise OSError('broken')"))
    monkeypatch.syspath_prepend(env["PYTHONPATH"].rpartition(":")[2])
    monkeypatch.setenv("QHUB_PLUGINS", env["QHUB_PLUGINS"])
    plugins = Plugins.load()
    assert distributions(["toy-b", None, "unknown"], plugins) == ("qhub-two",)
    assert distributions(["toy-a", "toy-b", "toy-c"], plugins) == ("qhub-one", "qhub-two")
    with pytest.warns(PluginWarning, match="broken"):
        assert set(plugins.quantizers) == {"toy-a", "toy-b"}
