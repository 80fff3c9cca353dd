"""A process of its own in which a part of a plugin is checked: `python -m qhub.testing.probe FOLDER MODE`.

It reads `job.json` of FOLDER and writes a line to `results.jsonl` as each check begins and ends, so that a process that dies says where.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qhub.errors import QhubError
from qhub.testing.guard import Guard
from qhub.testing.result import FAIL, PASS, SKIP, CheckFailedError, CheckSkippedError

JOB, RESULTS = "job.json", "results.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """What is checked: the plugin, and of it a component (`kind` such as quantizer) where the mode needs one."""

    plugin: str
    distribution: str
    module: str
    kind: str = ""
    component: str = ""
    modules: tuple[str, ...] = ()  # those that the mode `missing` hides

    def save(self, folder: Path) -> None:
        """Write it where the process reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass(frozen=True)
class Record:
    """Writes down what checks find."""

    file: Path

    def say(self, **facts: Any) -> None:  # noqa: ANN401 - JSON values
        """Write one line now."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")

    def check(self, name: str, component: str, function: Callable[[], object]) -> bool:
        """Run one check and write down how it ended; whether it passed."""
        self.say(begin=name, component=component)
        started = time.perf_counter()
        outcome, reason = PASS, ""
        try:
            function()
        except CheckSkippedError as skipped:
            outcome, reason = SKIP, str(skipped)
        except CheckFailedError as failed:
            outcome, reason = FAIL, str(failed)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's own code
            outcome, reason = FAIL, said(error)
        seconds = round(time.perf_counter() - started, 3)
        self.say(check=name, component=component, outcome=outcome, reason=reason, seconds=seconds)
        return outcome == PASS


def said(error: BaseException) -> str:
    """The kind and the first line of an error; qhub's own say what they are."""
    if isinstance(error, QhubError):
        return error.message
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def main(folder: Path, mode: str) -> int:
    """Do what `mode` says; always 0, what is wrong is in the results."""
    job = Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    record = Record(folder / RESULTS)
    home = "declared" if mode in ("import", "declare", "missing") else "working"
    warnings.simplefilter("ignore")  # of libraries; what checks look at they ask for
    work = importlib.import_module(f"qhub.testing.{home}").MODES[mode]
    guard = Guard.install(folder.parent)  # from here on: what was imported until now is not the plugin's doing
    work(job, record, folder)
    sys.stdout.flush()
    record.say(tried=guard.tried)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
