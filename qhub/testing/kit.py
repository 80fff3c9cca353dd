"""Runs the checks: starts a process for each part, and puts together what they found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qhub.route.registry import load_registry
from qhub.testing.probe import RESULTS, Job
from qhub.testing.result import ABOUT, FAIL, PASS, SKIP, Check
from qhub.testing.subject import Subject

IMPORT_LIMIT_S = 0.05
_TRIES = 3
_LIMIT_S = 600.0
_WORK: Mapping[str, tuple[str, ...]] = {
    "quantizer": ("quantizes", "deterministic", "resumable", "clean-errors"),
    "exporter": ("exports", "exact", "deterministic"),
    "runtime": ("opens", "generates"),
}
_GUARDED = ("no-network", "no-stray-files", "no-output")


def run_checks(subject: Subject) -> list[Check]:
    """All checks of a plugin, in the order of `ABOUT`; nothing raises, what is wrong is in them."""
    load_registry()  # keeps what it read in the user's cache: the core's doing, which no check may take for the plugin's
    with tempfile.TemporaryDirectory(prefix="qhub-check-") as folder:
        checks = list(_Kit(subject, Path(folder)).checks())
    order = list(ABOUT)
    return sorted(checks, key=lambda check: (check.component != "plugin", check.component, order.index(check.name)))


@dataclass
class _Kit:
    subject: Subject
    work: Path

    def checks(self) -> Iterator[Check]:
        job = Job(self.subject.name, self.subject.distribution, self.subject.module)
        declared = self._probe(job, "declare")
        nothing: dict[str, Any] = {"components": [], "requires": []}
        facts = next((line for line in declared if "components" in line), nothing)
        yield self._light(replace(job, modules=tuple(facts["requires"])))
        yield from _ended(declared)
        yield from self._missing(job, facts["requires"])
        lines = list(declared)
        for part in facts["components"]:
            found = self._working(replace(job, kind=part["kind"], component=part["name"]), part["missing"])
            yield from _ended(found)
            lines += found
        yield from _guarded(lines)

    def _light(self, job: Job) -> Check:
        """The fastest of three imports counts: a busy machine is not the plugin's fault."""
        seconds, heavy = float("inf"), []
        for _ in range(_TRIES):
            line = next((line for line in self._probe(job, "import") if "import_seconds" in line or "import_error" in line), {})
            if "import_seconds" not in line:
                return Check("light-import", "plugin", FAIL, line.get("import_error", "the process that imports it died"))
            seconds, heavy = min(seconds, line["import_seconds"]), line["heavy"]
            if not IMPORT_LIMIT_S < seconds < 20 * IMPORT_LIMIT_S:
                break
        wrong = [f"it took {seconds * 1000:.0f} ms"] if seconds > IMPORT_LIMIT_S else []
        wrong += [f"it imports {', '.join(f'`{name}`' for name in heavy)}: do that in the method that works"] if heavy else []
        return Check("light-import", "plugin", FAIL if wrong else PASS, "; ".join(wrong), round(seconds, 4))

    def _missing(self, job: Job, requires: list[str]) -> Iterable[Check]:
        if not requires:
            return [Check("missing-modules", "plugin", SKIP, "it requires no modules")]
        return _ended(self._probe(replace(job, modules=tuple(requires)), "missing"))

    def _working(self, job: Job, missing: list[str]) -> list[dict[str, Any]]:
        lacking = missing or [name for name in ("torch", "transformers") if not _importable(name)]
        title = f"{job.kind} {job.component}"
        if lacking:
            why = f"{', '.join(f'`{name}`' for name in lacking)} is not installed here"
            return [{"check": name, "component": title, "outcome": SKIP, "reason": why, "seconds": 0.0} for name in _WORK[job.kind]]
        return self._probe(job, job.kind)

    def _probe(self, job: Job, mode: str) -> list[dict[str, Any]]:
        """What a process in `mode` wrote, and a failure of the check in which it died."""
        folder = self.work / f"{mode}-{job.component or 'plugin'}"
        shutil.rmtree(folder, ignore_errors=True)
        job.save(folder)
        (folder / "tmp").mkdir()
        stdout = folder / "stdout.txt"
        with stdout.open("wb") as out, (folder / "stderr.txt").open("wb") as err:
            command = [sys.executable, "-m", "qhub.testing.probe", str(folder), mode]
            how = _run(command, folder, {**self.subject.environment(self.work), **_settings(folder)}, (out, err))
        file = folder / RESULTS
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        if printed := stdout.read_bytes():
            lines.append({"tried": {"no-output": [printed.decode(errors="replace").strip().splitlines()[0][:80]]}})
        return lines if how is None else [*lines, _death(lines, job, mode, how)]


def _settings(folder: Path) -> dict[str, str]:
    """Variables that keep what libraries write inside `folder`."""
    return {
        "TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": str(folder / "tmp"),
    }  # fmt: skip


def _run(command: list[str], folder: Path, environment: dict[str, str], streams: tuple[Any, Any]) -> str | None:
    """Run it to its end; how it ended, if not by itself."""
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1])
    try:
        code = process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"it did not end within {_LIMIT_S:.0f} s"
    finally:
        process.kill()
        process.wait()
    if code < 0:
        return f"the process died with signal {-code}"
    return None if code == 0 else f"the process ended with code {code}"


def _death(lines: list[dict[str, Any]], job: Job, mode: str, how: str) -> dict[str, Any]:
    begun = [line for line in lines if "begin" in line]
    ended = {(line["check"], line["component"]) for line in lines if "check" in line}
    open_ones = [line for line in begun if (line["begin"], line["component"]) not in ended]
    first = {"declare": "entry-point", "import": "light-import", "missing": "missing-modules"}.get(mode) or _WORK[job.kind][0]
    title = f"{job.kind} {job.component}".strip() or "plugin"
    name, component = (open_ones[-1]["begin"], open_ones[-1]["component"]) if open_ones else (first, title)
    return {"check": name, "component": component, "outcome": FAIL, "reason": how, "seconds": 0.0}


def _ended(lines: Iterable[dict[str, Any]]) -> Iterator[Check]:
    for line in lines:
        if "check" in line:
            yield Check(line["check"], line["component"], line["outcome"], line["reason"], line["seconds"])


def _guarded(lines: list[dict[str, Any]]) -> Iterator[Check]:
    """What was tried against the rules, in all processes together."""
    tried: dict[str, list[str]] = {}
    for line in lines:
        for check, what in line.get("tried", {}).items():
            tried.setdefault(check, []).extend(item for item in what if item not in tried.get(check, ()))
    said = {"no-network": "it tried to reach", "no-stray-files": "it tried to write", "no-output": "it printed"}
    for name in _GUARDED:
        found = [f"`{item}`" for item in tried.get(name, ())]
        yield Check(name, "plugin", FAIL if found else PASS, f"{said[name]} {', '.join(found)}" if found else "")


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
