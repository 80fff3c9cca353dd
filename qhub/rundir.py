"""A run directory: where each stage finds its input and leaves its output, and what is already done.

    recipe.yaml   what to do                     quantized/   the QuantizedModel (appears when it is complete)
    artifact/     one folder per format          report.json, report.html, events.jsonl
    state.json    settings and finished stages   work/        what an interrupted stage needs; gone at the end

Every file is written beside and renamed into place, so that whenever a process ends, the next one finds the old or the new.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qhub.errors import QhubError, UsageError
from qhub.locks import hold

RECIPE = "recipe.yaml"
STATE = "state.json"
WALKED = "work/path.json"  # the way through the flowchart that the run took
EXPECTED = "work/expected.json"  # what the run was expected to take, from its beginning


@dataclass(frozen=True)
class Settings:
    """How a run is carried out: nothing here changes the bytes of its result."""

    device: str = "cpu"
    max_memory_bytes: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class RunDir:
    """The paths of one run, and the state kept in it."""

    path: Path
    settings: Settings = field(default_factory=Settings)
    done: tuple[str, ...] = ()

    @property
    def recipe(self) -> Path:
        """The recipe file."""
        return self.path / RECIPE

    @property
    def quantized(self) -> Path:
        """The QuantizedModel's folder; exists only when complete."""
        return self.path / "quantized"

    @property
    def partial(self) -> Path:
        """Where the QuantizedModel grows."""
        return self.path / "quantized.partial"

    @property
    def artifacts(self) -> Path:
        """The folder of exported artifacts."""
        return self.path / "artifact"

    @property
    def work(self) -> Path:
        """What only an unfinished run needs."""
        return self.path / "work"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def holds_results(self) -> bool:
        """Whether a block, a whole model, an epoch or a stage is finished: without one there is nothing that resuming would save."""
        unfinished = (*self.work.glob("block-*.json"), *self.work.glob("whole"), *self.work.glob("checkpoint.*"))
        return bool(self.done) or self.quantized.exists() or bool(unfinished)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """A run directory that `create` made.

        :raises QhubError: when it is none, or its state cannot be read.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            done = state["done"]
            if not isinstance(done, list) or not all(isinstance(name, str) for name in done):
                raise TypeError
            return cls(path, Settings(**state["settings"]), tuple(done))
        except FileNotFoundError:
            raise QhubError(f"`{path}` is not a run directory: it has no {STATE}", hint="`qhub run` makes one") from None
        except (ValueError, KeyError, TypeError):
            hint = f"`rm {path / STATE}`, then `qhub run --resume --out {path}`: finished blocks are kept"
            raise QhubError(f"`{path / STATE}` is damaged", hint=hint) from None

    @classmethod
    def create(cls, path: Path, settings: Settings, recipe: str, *, done: tuple[str, ...] = ()) -> RunDir:
        """Make the directory with its recipe and its state; one that was left half made is completed."""
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, settings, done)
        run._put(RECIPE, recipe)
        return run.save()

    def save(self) -> RunDir:
        """Write the state."""
        self.write(STATE, {"settings": asdict(self.settings), "done": list(self.done)})
        return self

    def finished(self, stage: str) -> RunDir:
        """The same run with `stage` done, saved."""
        return replace(self, done=(*self.done, stage)).save()

    def write(self, name: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """Write JSON file `name`."""
        self._put(name, json.dumps(value, indent=1) + "\n")

    def _put(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / name)

    def read(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """Read JSON file `name` that a stage before wrote.

        :raises QhubError: when that stage has not run, or the file is damaged.
        """
        again = f"`rm {self.path / STATE}`, then `qhub run --resume --out {self.path}`"
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QhubError(f"`{self.path}` has no {name}: the stage before has not run", hint=again) from None
        except ValueError:
            raise QhubError(f"`{self.path / name}` is damaged", hint=again) from None

    def log(self) -> list[dict[str, Any]]:
        """The events so far; lines that are no event (the machine lost power while one was written) are left out."""
        if not self.events.exists():
            return []
        found = []
        for line in self.events.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    found.append(event)
        return found

    def tidy(self) -> RunDir:
        """Remove what an interrupted process left half written, so that what is appended or counted next is whole."""
        for folder in (self.path, self.partial, self.work):
            for path in folder.glob("*.partial"):
                if path.is_file():
                    path.unlink()
        if self.events.exists():
            written = self.events.read_bytes()
            whole = written.rfind(b"\n") + 1
            if whole < len(written):
                os.truncate(self.events, whole)
        return self

    def discard(self) -> None:
        """Remove all files of this run."""
        for folder in (self.work, self.partial, self.artifacts):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.recipe, self.path / STATE, self.events, *self.path.glob("*.partial")):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory `path` for this process, making it if need be; what was made and is still empty at the end goes again.

    However the process ends, the directory is free then.

    :raises UsageError: when another process holds it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    held = _hold(path)
    try:
        yield
    finally:
        held.close()
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


def _hold(path: Path) -> contextlib.ExitStack:
    try:
        return hold(path)
    except BlockingIOError:
        message = f"`{path}` is in use: another process is working on this run"
        raise UsageError(message, hint="wait until it ends, or give another directory: `--out DIR`") from None
