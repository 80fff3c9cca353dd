"""The documentation says what is there: hooks with their signatures, commands with their options, files that exist."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

from qhub import hookspecs
from qhub.cli import COMMANDS, LazyGroup, cli
from qhub.prove.report import Report

ROOT = Path(__file__).parent.parent
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def walk(command, path):
    """`command` and every command below it, with the words that call it."""
    yield path, command
    if isinstance(command, LazyGroup):
        context = click.Context(command)
        for name in COMMANDS:
            yield from walk(command.get_command(context, name), f"{path} {name}")
    elif isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, f"{path} {name}")


ALL = dict(walk(cli, "qhub"))


def options_of(command):
    parameters = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}


def sections():
    """The sections of docs/cli.md by the command that their heading names, without its arguments."""
    parts = re.split(r"^## `([^`]+)`$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r" \[?[A-Z]+\]?", "", heading): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_every_command_is_documented_and_no_other():
    assert sorted(sections()) == sorted(ALL)


@pytest.mark.parametrize("path", ALL)
def test_every_option_is_documented_and_no_other(path):
    documented = set(re.findall(r"`(--?[a-z-]+)", "".join(re.findall(r"^\| (`-.*?) \|", sections()[path], flags=re.MULTILINE))))
    assert documented - {"--help", "-h"} == options_of(ALL[path]) - {"--help", "-h"}


@pytest.mark.parametrize("path", ALL)
def test_every_command_and_option_has_a_help_text(path):
    command = ALL[path]
    assert command.help
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []


HOOKS = {name: function for name, function in vars(hookspecs).items() if name.startswith("qhub_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(name):
    signature = str(inspect.signature(HOOKS[name])).replace("'", "")
    assert f"## `{name}{signature}`" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8").splitlines()


def test_no_hook_is_documented_that_does_not_exist():
    documented = re.findall(r"^## `(\w+)\(", (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert documented == list(HOOKS)


def shown_commands():
    """Every `qhub …` line of a code block in the documentation, as words."""
    for file in DOCS:
        for line in re.findall(r"^    (qhub .*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            yield pytest.param(shlex.split(line, comments=True), id=f"{file.name}: {line}")


@pytest.mark.parametrize("words", list(shown_commands()))
def test_every_command_that_is_shown_exists_with_its_options(words):
    command, arguments = cli, words[1:]
    while isinstance(command, click.Group) and arguments:
        command, arguments = command.get_command(click.Context(command), arguments[0]), arguments[1:]
        assert command is not None, words
    assert {word for word in arguments if word.startswith("--")} <= options_of(command)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_readme_shows_the_command_of_the_first_example_literally():
    assert "    qhub run --plugin awq --target apple-m1 " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_lists_every_plugin_and_no_other():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_and_named_files_exist(file):
    text = file.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (file.parent / link).exists(), f"{file.name} links to `{link}`"
    for name in re.findall(r"`((?:qhub|tests|docs|benchmarks)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{file.name} names `{name}`"


def test_design_names_every_additional_field_of_the_report():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for name in ("method", "scheme", "bytes_by_class", "fallbacks", "warnings", "checked", "not_checked", "estimate"):
        assert name in Report.__dataclass_fields__
        assert f"`{name}`" in text
