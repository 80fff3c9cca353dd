"""Plugins: each is a real module in a folder, found through an entry point; a bad one never stops the others."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import EntryPoint

import click
import pytest

from qhub.errors import PluginError, UsageError
from qhub.interfaces import Component
from qhub.plugins import Plugins, PluginWarning, missing_modules, suggest

GOOD = """
from qhub import Exporter, ModelSource, Quantizer, Runtime, hookimpl

class Nearest(Quantizer):
    name = "nearest"

class Folder(Exporter):
    name = "folder"

class Engine(Runtime):
    name = "engine"

@hookimpl
def qhub_quantizers():
    return [Nearest()]

@hookimpl
def qhub_exporters():
    return [Folder()]

@hookimpl
def qhub_runtimes():
    return [Engine()]

@hookimpl
def qhub_models():
    return [ModelSource("toy:llm", "/nowhere", "a toy")]
"""
MISSPELT = """
from qhub import hookimpl

@hookimpl
def qhub_quantisers():
    return []
"""


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Write a plugin's module and return its entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("QHUB_PLUGINS", raising=False)
    monkeypatch.delenv("QHUB_DISABLED_PLUGINS", raising=False)
    before = set(sys.modules)

    def make(name, source):
        (tmp_path / f"toy_{name}.py").write_text(source, encoding="utf-8")
        return EntryPoint(name, f"toy_{name}", "qhub")

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("toy_"):
            del sys.modules[name]


def test_a_good_plugin_offers_its_components_by_name(entry):
    plugins = Plugins.load([entry("good", GOOD)])
    kinds = (plugins.quantizers, plugins.exporters, plugins.runtimes, plugins.models, plugins.targets)
    assert [sorted(kind) for kind in kinds] == [["nearest"], ["folder"], ["engine"], ["toy:llm"], []]
    assert plugins.components_of("good") == {
        "quantizers": ["nearest"],
        "exporters": ["folder"],
        "runtimes": ["engine"],
        "models": ["toy:llm"],
    }


# A plugin that cannot be loaded: its distribution is named, why is said, and the others work.
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_sdk", "ModuleNotFoundError: No module named 'no_such_sdk'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: invalid syntax (toy_bad.py, line 1)"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("raise RuntimeError", "RuntimeError:"),
        (MISSPELT, "PluginValidationError: unknown hook 'qhub_quantisers' in plugin "),
    ],
    ids=["missing-sdk", "raises", "syntax-error", "long-message", "no-message", "misspelt-hook"],
)
def test_broken_plugin_does_not_stop_the_others(entry, source, why):
    with pytest.warns(PluginWarning) as caught:
        plugins = Plugins.load([entry("bad", source), entry("good", GOOD)])
    assert [str(item.message).startswith(f"plugin `bad` of `toy_bad` was left out: {why}") for item in caught] == [True]
    assert list(plugins.quantizers) == ["nearest"]
    assert [(info.name, info.error is None) for info in plugins.infos] == [("bad", False), ("good", True)]


def test_a_broken_plugin_that_is_named_says_why_it_is_broken(entry):
    with pytest.warns(PluginWarning):
        plugins = Plugins.load([entry("bad", "1 / 0")])
    with pytest.raises(PluginError) as caught:
        plugins.components_of("bad")
    assert caught.value.message == "plugin `bad` of `toy_bad` is broken: ZeroDivisionError: division by zero"


# A plugin that loads, and fails when it is asked.
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise OSError('no driver')", "OSError: no driver"),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
        ("return [object()]", "AttributeError: 'object' object has no attribute 'name'"),
    ],
    ids=["raises", "forgets-to-return", "returns-nonsense"],
)
def test_a_hook_that_fails_is_left_out_with_a_warning(entry, body, why):
    source = f"from qhub import hookimpl\n\n@hookimpl\ndef qhub_quantizers():\n    {body}\n"
    plugins = Plugins.load([entry("bad", source), entry("good", GOOD)])
    with pytest.warns(PluginWarning) as caught:
        assert list(plugins.quantizers) == ["nearest"]
    assert [str(item.message) for item in caught] == [f"plugin `bad` of `toy_bad` failed in `qhub_quantizers`: {why}"]
    with pytest.raises(PluginError) as error:
        plugins.components_of("bad")
    assert error.value.message == f"plugin `bad` of `toy_bad` failed in `qhub_quantizers`: {why}"


def test_two_components_of_one_name_are_an_error_that_names_both(entry):
    plugins = Plugins.load([entry("first", GOOD), entry("second", GOOD)])
    with pytest.raises(PluginError) as caught:
        _ = plugins.quantizers
    assert caught.value.message == "two plugins offer `nearest`: `toy_first` and `toy_second`"
    assert caught.value.hint == "disable one: `QHUB_DISABLED_PLUGINS=second`, or `pip uninstall toy_second`"


def test_two_plugins_of_one_name_keep_the_first(entry, tmp_path):
    first, other = entry("good", GOOD), entry("other", GOOD)
    with pytest.warns(PluginWarning, match="plugin `good` of `toy_other` was left out: ValueError: Plugin name already registered"):
        plugins = Plugins.load([first, EntryPoint("good", other.value, "qhub")])
    assert list(plugins.quantizers) == ["nearest"]


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("QHUB_PLUGINS", "", []),
        ("QHUB_PLUGINS", "good", ["good"]),
        ("QHUB_PLUGINS", "bad,good", ["bad", "good"]),
        ("QHUB_DISABLED_PLUGINS", "bad", ["good"]),
        ("QHUB_DISABLED_PLUGINS", "", ["bad", "good"]),
    ],
)
@pytest.mark.filterwarnings("ignore::qhub.plugins.PluginWarning")
def test_the_environment_chooses_which_plugins_load(entry, monkeypatch, variable, value, left):
    monkeypatch.setenv(variable, value)
    plugins = Plugins.load([entry("good", GOOD), entry("bad", "1 / 0")])
    assert [info.name for info in plugins.infos] == left


def test_a_blocked_plugin_is_not_even_imported(entry, monkeypatch):
    monkeypatch.setenv("QHUB_DISABLED_PLUGINS", "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plugins.load([entry("bad", "raise SystemError")])
    assert "toy_bad" not in sys.modules


def test_an_unknown_plugin_is_an_error_with_the_nearest_name(entry):
    plugins = Plugins.load([entry("good", GOOD)])
    with pytest.raises(UsageError) as caught:
        plugins.components_of("god")
    assert caught.value.message == "unknown plugin `god`"
    assert caught.value.hint == "did you mean `good`? known: good (a plugin may bring it: `pip install qhub-god`)"


def test_a_plugin_adds_a_command_and_a_failing_one_is_warned_about(entry):
    adds = "import click\nfrom qhub import hookimpl\n\n@hookimpl\ndef qhub_commands(cli):\n    cli.add_command(click.Command('hello'))\n"
    fails = "from qhub import hookimpl\n\n@hookimpl\ndef qhub_commands(cli):\n    raise KeyError('x')\n"
    group = click.Group()
    with pytest.warns(PluginWarning, match="plugin `bad` of `toy_bad` failed in `qhub_commands`: KeyError: 'x'"):
        Plugins.load([entry("bad", fails), entry("good", adds)]).add_commands(group)
    assert list(group.commands) == ["hello"]


def test_what_a_component_needs_and_is_not_here_is_listed_without_importing():
    class Needy(Component):
        requires = ("json", "no_such_sdk", "no_such_package.inner", "colorsys")

    sys.modules.pop("colorsys", None)
    assert missing_modules(Needy()) == ("no_such_sdk", "no_such_package.inner")
    assert "colorsys" not in sys.modules


def test_suggestion_without_anything_near_lists_all():
    assert suggest("zzz", ["rtn", "awq"]) == "known: awq, rtn (a plugin may bring it: `pip install qhub-zzz`)"
    assert suggest("zzz", []) == "known: none (a plugin may bring it: `pip install qhub-zzz`)"
