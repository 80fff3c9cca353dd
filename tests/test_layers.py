"""Imports point one way, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: From the bottom up: a module may import its own layer and those below.
LAYERS = (
    ("types", "errors", "events", "locks", "weights", "units", "tokens", "spool", "skeleton"),
    ("interfaces", "hookspecs", "quantize.qtensor", "decoders", "graph", "data"),
    ("plugins", "quiet", "isolation"),
    ("route", "quantize", "prove"),
    (
        *("history", "rundir", "texts", "preflight", "feeding", "networks", "expect", "pipeline", "stage", "worker", "isolation.apart"),
        *("convert", "reproduce"),
    ),
    ("opening", "chat"),
    ("tune", "testing", "scaffold"),
    ("cli", "__main__"),
)
SIBLINGS_ALLOWED = {("prove", "quantize.store"), ("prove", "quantize.layouts.reader")}
PLUGINS = ("awq", "demo", "gptq", "hf", "native", "onnxruntime", "openvino", "ptq", "qat", "rtn")


def imports_of(file: Path) -> Iterator[str]:
    """Every module that `file` imports, also inside functions; `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int:
    """The layer of `module` (without `qhub.`): the longest name that is a prefix of it decides."""
    known = [(len(name), index) for index, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert known, f"`{module}` is in no layer of {Path(__file__).name}"
    return max(known)[1]


def core_files() -> list[Path]:
    return [file for file in sorted((ROOT / "qhub").rglob("*.py")) if file.name != "__init__.py" or file.parent.name == "cli"]


@pytest.mark.parametrize("file", core_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_core_imports_only_what_lies_below(file):
    module = ".".join(file.relative_to(ROOT / "qhub").with_suffix("").parts).removesuffix(".__init__")
    for name in imports_of(file):
        assert not name.startswith("qhub_"), f"the core imports the plugin `{name}`"
        assert name.partition(".")[0] != "rich" or module == "cli.output", "rich is for cli/output.py"
        if not name.startswith("qhub.") or name == "qhub.__version__":
            continue
        imported = name.removeprefix("qhub.")
        if imported.partition(".")[0][0].isupper():
            continue  # the public API, which a docstring's example imports
        assert layer_of(imported) <= layer_of(module), f"`{module}` imports `{imported}` of a higher layer"
        family, other = module.partition(".")[0], imported.partition(".")[0]
        if layer_of(imported) == layer_of(module) == 3 and family != other:
            assert any(family == who and imported.startswith(what) for who, what in SIBLINGS_ALLOWED), f"`{module}` imports `{imported}`"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "plugins").glob("*/qhub_*/**/*.py")), ids=lambda file: str(file.relative_to(ROOT / "plugins"))
)
def test_a_plugin_imports_qhub_and_nothing_deeper(file):
    own = file.relative_to(ROOT / "plugins").parts[1]
    for name in imports_of(file):
        package, _, rest = name.partition(".")
        assert not package.startswith("qhub_") or package == own, f"a plugin imports another: `{name}`"
        assert package != "qhub" or "." not in rest, f"a plugin imports `{name}`, deeper than the public API"


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], ["plugins"], ["targets"], ["recommend", "demo:llm"], ["inspect", "demo:llm"]], ids=str
)
def test_what_must_start_fast_imports_nothing_heavy(qhub, arguments):
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    missing = [name for name in PLUGINS if f"qhub-{name}" not in installed]
    if missing and arguments is not None:
        pytest.skip(f"plugins not installed: {', '.join(missing)} (make test installs them)")
    call = "" if arguments is None else f"from qhub.cli import main; code = main({arguments}); assert code == 0, code; "
    heavy = "heavy = {'torch', 'transformers', 'rich', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    ran = qhub(command=("-c", f"import sys, qhub; {call}{heavy}"), env={"QHUB_PLUGINS": ",".join(PLUGINS)})
    assert (ran.code, ran.err) == (0, "")
