"""What a run happens in and does not choose: installed versions and this machine. A recipe records both, nothing depends on them."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping

from qhub.errors import PluginError
from qhub.isolation.environments import locked_versions
from qhub.plugins import Plugins, installed_version
from qhub.route.host import cpu_model, detect
from qhub.types import Difference, Recipe

ABSENT = "none"
_DISTRIBUTIONS = ("qhub-core", "numpy", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors")


def installed(plugins: Iterable[str]) -> dict[str, str]:
    """What a run depends on: Python, the core and its libraries, and the distributions of the `plugins` that it uses."""
    return versions((*_DISTRIBUTIONS, *plugins))


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The version of each distribution that is installed here, or as `ENVIRONMENT/NAME` in an environment, and Python's; imports none."""
    names = dict.fromkeys(distributions)
    apart, here = locked_versions(name for name in names if "/" in name), (name for name in names if "/" not in name)
    there = {name: version for name in here if (version := installed_version(name)) is not None}
    return {"python": platform.python_version(), **apart, **there}


def distributions(names: Iterable[str | None], plugins: Plugins) -> tuple[str, ...]:
    """The distributions of the plugins that offer any of `names`."""
    wanted, found = set(names), []
    for info in plugins.infos:
        with contextlib.suppress(PluginError):  # a broken plugin offers nothing, and was warned of
            if any(wanted & set(offered) for offered in plugins.components_of(info.name).values()):
                found.append(info.distribution)
    return tuple(found)


def hardware() -> dict[str, str]:
    """This machine, as far as it can change the last bits of a sum: processor, instruction sets, threads, system, accelerators."""
    here = detect()
    return {
        "cpu": cpu_model(),
        "isa": " ".join(here.isa) or ABSENT,
        "threads": str(threads() or "unknown"),
        "os": platform.platform(),
        "accelerators": " ".join(here.accelerators) or ABSENT,
    }


def threads() -> int | None:
    """How many threads a computation takes: what `OMP_NUM_THREADS` says, else the cores of this process."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdigit() and int(asked) > 0 else detect().cores


def changes(recipe: Recipe) -> tuple[Difference, ...]:
    """What of the versions and the hardware in `recipe` is otherwise here; what it does not record is not compared."""
    pairs = (("version", recipe.versions, versions(recipe.versions)), ("hardware", recipe.hardware, hardware() if recipe.hardware else {}))
    return tuple(change for kind, recorded, now in pairs for change in _changes(kind, recorded, now))


def _changes(kind: str, recorded: Mapping[str, str], now: Mapping[str, str]) -> Iterable[Difference]:
    for name, old in recorded.items():
        if now.get(name, ABSENT) != old:
            yield Difference(kind, name, old, now.get(name, ABSENT))


def in_words(found: Iterable[Difference]) -> str:
    """Differences in one line: `numpy 1.26.4 → 2.1.0, threads 8 → 2`."""
    return ", ".join(f"{difference.name} {difference.recorded} → {difference.found}" for difference in found)
