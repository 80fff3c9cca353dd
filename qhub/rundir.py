"""A run directory: where each stage finds its input and leaves its output, and what is already done.

    recipe.yaml   what to do                     quantized/   the QuantizedModel (appears when it is complete)
    artifact/     one folder per format          report.json, report.html, events.jsonl
    state.json    settings and finished stages   work/        what an interrupted stage needs; gone at the end
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qhub.errors import QhubError

RECIPE = "recipe.yaml"
STATE = "state.json"


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

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """A run directory that `create` made.

        :raises QhubError: when it is none.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return cls(path, Settings(**state["settings"]), tuple(state["done"]))
        except FileNotFoundError:
            raise QhubError(f"`{path}` is not a run directory: it has no {STATE}", hint="`qhub run` makes one") from None
        except (ValueError, KeyError, TypeError):
            raise QhubError(f"`{path / STATE}` is damaged", hint="start the run again without `--resume`") from None

    @classmethod
    def create(cls, path: Path, settings: Settings, recipe: str) -> RunDir:
        """Make the directory with its recipe and an empty state."""
        path.mkdir(parents=True, exist_ok=True)
        (path / RECIPE).write_text(recipe, encoding="utf-8")
        return cls(path, settings).save()

    def save(self) -> RunDir:
        """Write the state beside and rename it into place."""
        self.write(STATE, {"settings": asdict(self.settings), "done": list(self.done)})
        return self

    def finished(self, stage: str) -> RunDir:
        """The same run with `stage` done, saved."""
        return replace(self, done=(*self.done, stage)).save()

    def write(self, name: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """Write JSON file `name` beside and rename it into place."""
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.path / name)

    def read(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """Read JSON file `name` that a stage before wrote.

        :raises QhubError: when that stage has not run.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QhubError(f"`{self.path}` has no {name}: the stage before has not run", hint="`qhub run --resume`") from None
