"""What an environment's interpreter is asked: one JSON object on stdout. Imports no heavy module itself.

python -m qhub.worker packages        what is installed, for the lock file
python -m qhub.worker declare NAME    what the plugin NAME offers
python -m qhub.worker reject          {"method", "profile", "scheme"} on stdin → {"reason": why not, or null}
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, get_args

from qhub.errors import PluginError, QhubError, UsageError
from qhub.interfaces import Component, Exporter, Quantizer, Runtime
from qhub.plugins import GROUP, Plugins, installed_version, missing_modules
from qhub.types import LayerShape, ModelProfile, Scheme, Task, as_json

_GROUPS = (None, 16, 32, 64, 128, 256)
_OTHER_SCHEMES = ("w8a8-static", "w8a8-dynamic", "w4a8-static", "w4a8-dynamic", "fp16", "bf16", "nf4")


def packages() -> dict[str, Any]:
    """Python's version, and every installed distribution with its own."""
    found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return {"python": platform.python_version(), "packages": dict(sorted(found.items(), key=lambda pair: pair[0].lower()))}


def declare(name: str) -> dict[str, Any]:
    """What the plugin `name` is and offers.

    :raises PluginError: when there is none of that name, it is broken, or something that it needs cannot be imported.
    """
    points = list(metadata.entry_points(group=GROUP))
    point = next((point for point in points if point.name == name), None)
    if point is None:
        raise PluginError(f"no plugin `{name}` was installed", hint=f"found: {', '.join(sorted({one.name for one in points})) or 'none'}")
    plugins = Plugins.load([point])
    offers = plugins.components_of(name)
    kinds = ("quantizers", "exporters", "runtimes")
    parts: list[Component] = [getattr(plugins, kind)[one] for kind in kinds for one in offers.get(kind, ())]
    lacking = sorted({module for part in parts for module in missing_modules(part)})
    if lacking:
        raise PluginError(f"plugin `{name}` needs `{lacking[0]}`, which cannot be imported there", hint="report it to the plugin's author")
    info = plugins.infos[0]
    tools = {tool: version for tool in _requirements(point) if (version := installed_version(tool)) is not None}
    components = [_declaration(part) for part in parts]
    return {"distribution": info.distribution, "version": info.version, "tools": tools, "components": components}


def _requirements(point: metadata.EntryPoint) -> list[str]:
    """The names of the distributions that the plugin's own one asks for."""
    asked = metadata.requires(point.dist.name) if point.dist else None
    return [match[0] for text in asked or () if (match := re.match(r"[\w.-]+", text)) and "extra ==" not in text]


def _declaration(part: Component) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": part.name, "summary": part.summary, "distribution": part.distribution, "requires": part.requires}
    if isinstance(part, Quantizer):
        facts |= {
            "kind": "quantizer",
            "family": part.family,
            "families": part.families,
            "default_scheme": part.default_scheme,
            "needs": sorted(part.needs),
        }
        facts |= {"scales": part.scales, "options": dict(part.options), "whole": part.whole, **_answers(part)}
    elif isinstance(part, Exporter):
        facts |= {"kind": "exporter", "format": part.format, **_answers(part)}
    elif isinstance(part, Runtime):
        facts |= {"kind": "runtime", "formats": part.formats, "targets": _targets(part)}
    return facts


def _answers(part: Quantizer | Exporter) -> dict[str, Any]:
    """Which schemes it takes and why not the others, asked about a model of which nothing is known; which tasks it refuses."""
    asked = {str(scheme): part.reject(_unknown_model("llm"), scheme) for scheme in _schemes()}
    taken = [scheme for scheme, reason in asked.items() if reason is None]
    tasks = {task: part.reject(_unknown_model(task), Scheme.parse(taken[0])) for task in get_args(Task)} if taken else {}
    return {
        "schemes": taken,
        "refused": {scheme: reason for scheme, reason in asked.items() if reason is not None},
        "tasks": {task: reason for task, reason in tasks.items() if reason is not None},
    }


def _schemes() -> Iterator[Scheme]:
    yield from (Scheme(bits, 16, group, symmetric) for bits in range(2, 9) for group in _GROUPS for symmetric in (True, False))
    yield from (Scheme.parse(text) for text in _OTHER_SCHEMES)


def _unknown_model(task: Task) -> ModelProfile:
    return ModelProfile("any model", "", task, "unknown", 0, "bf16", 0)


def _targets(part: Runtime) -> dict[str, str]:
    """The known devices that it refuses, this machine among them, and why."""
    from qhub.route.host import detect
    from qhub.route.registry import HOST, load_registry

    known = {**load_registry().targets, HOST: detect()}
    return {name: reason for name, target in known.items() if (reason := part.reject(target)) is not None}


def reject(question: dict[str, Any]) -> dict[str, Any]:
    """Ask a method about one model and scheme."""
    layers = tuple(LayerShape(**{**layer, "shape": tuple(layer["shape"])}) for layer in question["profile"]["layers"])
    profile = ModelProfile(**{**question["profile"], "layers": layers})
    return {"reason": Plugins.load().quantizers[question["method"]].reject(profile, Scheme.parse(question["scheme"]))}


def main(arguments: list[str]) -> int:
    """Answer one question; what plugins print goes to stderr."""
    questions: dict[str, Callable[[], dict[str, Any]]] = {
        "packages": packages,
        "declare": lambda: declare(arguments[1]),
        "reject": lambda: reject(json.load(sys.stdin)),
    }
    try:
        if not arguments or arguments[0] not in questions or len(arguments) != 1 + (arguments[0] == "declare"):
            raise UsageError("a worker is asked `packages`, `declare NAME` or `reject`")
        with contextlib.redirect_stdout(sys.stderr):
            answer = questions[arguments[0]]()
    except QhubError as error:
        print(error.text, file=sys.stderr)
        return int(error.exit_code)
    print(json.dumps(as_json(answer)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
