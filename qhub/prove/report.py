"""The Report: what a run found, and `report.json` (fields: docs/design.md). How it looks is in `render.py`.

"Drop" is defined in docs/metrics.md. Sizes are bytes of all files together; rates and shares are fractions in 0 … 1
unless the name ends in `_pct`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union

from qhub.errors import QhubError
from qhub.types import Step, as_json

FILE = "report.json"
_T = TypeVar("_T")


@dataclass(frozen=True)
class FloatResult:
    """The model before quantization."""

    bytes: int
    accuracy: float
    perplexity: float | None = None


@dataclass(frozen=True)
class QuantizedResult:
    """The model after quantization; `kl` (nats per token) and `top1_agreement` compare it with the float model on the same tokens."""

    bytes: int
    bits_per_weight: float
    accuracy: float
    perplexity: float | None = None
    drop_pct: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None  # of networks: mean cosine similarity of the outputs


@dataclass(frozen=True, kw_only=True)
class BaselineResult(QuantizedResult):
    """The same for the simplest method at the same scheme, so that the gain of the chosen one shows."""

    method: str = "rtn"


@dataclass(frozen=True)
class TargetsResult:
    """What the user asked, and whether it holds."""

    max_drop_pct: float
    met: bool


@dataclass(frozen=True)
class Parity:
    """How far an artifact is from the QuantizedModel it was made of; `how` says how that was found.

    `top1_agreement`: the share of positions whose most probable next token is the reference's.
    """

    checked: bool
    max_abs_diff: float | None = None
    codes_identical: bool | None = None
    how: str = ""
    top1_agreement: float | None = None


@dataclass(frozen=True)
class ArtifactResult:
    """One artifact of the run; `path` is relative to the run directory."""

    format: str
    path: str
    bytes: int
    sha256: str
    parity: Parity = field(default_factory=lambda: Parity(checked=False))
    accuracy: float | None = None  # of a network, measured in the engine that opens it


@dataclass(frozen=True)
class StageResult:
    """What one stage cost; `peak_rss_bytes` is the process's peak up to its end."""

    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class EstimateResult:
    """A figure as it was estimated before the run, and as it was measured; `ratio` is measured ÷ estimated."""

    estimated: float | None = None
    measured: float | None = None
    ratio: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Fallback:
    """A layer that the method could not do and that was rounded to nearest instead."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run found. `float_model` is `float` in the JSON."""

    recipe_digest: str
    model: str
    target: str
    host: str
    method: str
    scheme: str
    metric: str
    float_model: FloatResult = field(metadata={"json": "float"})
    quantized: QuantizedResult
    targets: TargetsResult
    baseline: BaselineResult | None = None
    artifacts: tuple[ArtifactResult, ...] = ()
    bench: Mapping[str, Any] | None = None
    stages: tuple[StageResult, ...] = ()
    tuning: tuple[Mapping[str, Any], ...] = ()
    bytes_by_class: Mapping[str, int] = field(default_factory=dict)
    block_errors: tuple[float, ...] = ()  # relative squared output error after each block; its last digits follow the number of threads
    fallbacks: tuple[Fallback, ...] = ()
    warnings: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()
    path: tuple[Step, ...] = ()  # the way through the flowchart: node, question, answer
    estimate: Mapping[str, EstimateResult] = field(default_factory=dict)  # weight_bytes, peak_bytes, seconds, tokens_per_s

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        values = {item.name: as_json(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return {_json_name(item): values[item.name] for item in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Any) -> Report:  # noqa: ANN401 - JSON
        """Read what `to_json` wrote; fields it does not know are ignored.

        :raises QhubError: when a field is missing or is not what it should be, naming it.
        """
        return _decode(cls, data, "report")

    def save(self, run_dir: Path) -> Path:
        """Write `report.json` into `run_dir` (beside, then renamed) and return its path."""
        path = run_dir / FILE
        beside = path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path


def load(run_dir: Path) -> Report:
    """The report of a run directory (or of a `report.json`).

    :raises QhubError: when there is none, or it is not a report.
    """
    path = run_dir / FILE if run_dir.is_dir() else run_dir
    if not run_dir.exists():
        raise QhubError(f"`{run_dir}` does not exist", hint="give the directory that `qhub run` named at its end")
    if not path.exists():
        raise QhubError(f"`{run_dir}` has no {FILE}: it is not a run, or the run did not finish", hint=_resume_hint(run_dir))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QhubError(f"`{path}` is not JSON: {error}", hint="run it again") from None
    try:
        return Report.from_json(data)
    except QhubError as error:
        raise QhubError(f"`{path}` is not a report: {error.message}", hint="run it again with this version of qhub") from None


def _resume_hint(run_dir: Path) -> str:
    if (run_dir / "recipe.yaml").exists():
        return f"finish it: `qhub run --resume --out {run_dir}`"
    return "give the directory that `qhub run` named at its end"


def _json_name(item: dataclasses.Field[Any]) -> str:
    return str(item.metadata.get("json", item.name))


def _decode(kind: type[_T], data: Any, where: str) -> _T:  # noqa: ANN401 - JSON
    if not isinstance(data, dict):
        raise QhubError(f"`{where}` is not an object")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = _json_name(item)
        if name in data:
            values[item.name] = _value(hints[item.name], data[name], f"{where}.{name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise QhubError(f"`{where}.{name}` is missing")
    return kind(**values)


def _value(kind: Any, data: Any, where: str) -> Any:  # noqa: ANN401 - JSON
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if data is None else _value(arguments[0], data, where)
    if dataclasses.is_dataclass(kind):
        return _decode(kind, data, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(data, list):
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is Mapping and isinstance(data, dict):
        return {str(key): _value(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is Any:
        return data
    accepted = (int, float) if kind is float else kind
    if origin is None and isinstance(data, accepted) and (kind is bool or not isinstance(data, bool)):
        return data
    raise QhubError(f"`{where}` is `{str(data)[:60]}`, not {_described(kind)}")


def _described(kind: Any) -> str:  # noqa: ANN401 - a type
    origin = typing.get_origin(kind)
    names = {tuple: "a list", Mapping: "an object", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names[origin or kind]
