"""What a person is told of a plugin: what it offers, and whether it works here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qhub.errors import PluginError

if TYPE_CHECKING:
    from qhub.interfaces import Component
    from qhub.plugins import PluginInfo, Plugins
    from qhub.route.registry import IndexEntry


def how_to_get(entry: IndexEntry) -> str:
    """What stands between a known plugin and this machine."""
    return entry.obstacle.replace("`", "")


def describe(info: PluginInfo, installed: Plugins) -> dict[str, Any]:
    """One installed plugin: who it is, what it offers, and whether it works here (`state`)."""
    row: dict[str, Any] = {"name": info.name, "distribution": info.distribution, "version": info.version, "offers": {}, "components": []}
    if info.error is not None:
        return {**row, "state": f"broken: {info.error}"}
    try:
        row["offers"] = installed.components_of(info.name)
    except Exception as error:  # noqa: BLE001 - a plugin's own code
        return {**row, "state": f"broken: {type(error).__name__}: {error}"}
    try:
        found = [_component(kind, name, installed) for kind, names in row["offers"].items() for name in names]
    except PluginError as error:  # two of one name: nobody's are used until one is gone
        return {**row, "state": f"blocked: {error.message}"}
    row["components"] = [{"name": f"{kind[:-1]} {part.name}", "text": _text(part)} for kind, part in found if part is not None]
    return {**row, "state": _state(info, [part for _, part in found if part is not None])}


def _component(kind: str, name: str, installed: Plugins) -> tuple[str, Any]:
    return kind, getattr(installed, kind).get(name)


def _text(part: Any) -> str:  # noqa: ANN401 - a component or a model source
    facts = [part.summary]
    if family := getattr(part, "family", None):
        facts.append(f"serves {family}, {part.default_scheme} by default")
    if options := getattr(part, "options", None):
        facts.append("options " + ", ".join(f"{key}={value}" for key, value in options.items()))
    return "; ".join(facts)


def _state(info: PluginInfo, parts: list[Component]) -> str:
    from qhub.plugins import missing_modules

    missing = {module for part in parts if hasattr(part, "requires") for module in missing_modules(part)}
    if not missing:
        return "usable"
    install = next((part.distribution for part in parts if getattr(part, "distribution", "")), info.distribution)
    return f"not usable here, {', '.join(sorted(missing))} missing: pip install {install}"


def offers_text(offers: dict[str, list[str]]) -> str:
    """`quantizer awq, exporter hf`; a dash for nothing."""
    return ", ".join(f"{kind[:-1] if len(names) == 1 else kind} {' '.join(names)}" for kind, names in offers.items() if names) or "–"
