"""Turns what the stages left behind into the Report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qhub.prove.contents import contents, file_bytes
from qhub.prove.report import (
    ArtifactResult,
    BaselineResult,
    EstimateResult,
    Fallback,
    FloatResult,
    Parity,
    QuantizedResult,
    Report,
    StageResult,
    TargetsResult,
)
from qhub.types import Calibration, Recipe


def assemble(
    recipe: Recipe, recipe_digest: str, quantized: Path, found: Mapping[str, Any], events: Sequence[Mapping[str, Any]], host: str
) -> Report:
    """The report of a run; `found` has what the stages before wrote beside their results, and what was expected."""
    held = contents(quantized)
    measured = found["evaluation"]
    drop = drop_pct(measured["float"]["accuracy"], measured["quantized"]["accuracy"])
    result = QuantizedResult(bytes=held.bytes, bits_per_weight=held.bits_per_weight, drop_pct=drop, **measured["quantized"])
    artifacts = tuple(_artifact(item, found["parity"]) for item in found["artifacts"])
    stages = _stages(events)
    return Report(
        recipe_digest=recipe_digest,
        model=recipe.model,
        target=recipe.target,
        host=host,
        method=recipe.method,
        scheme=recipe.scheme,
        metric=measured.get("metric", "next_token_accuracy"),
        float_model=FloatResult(
            bytes=file_bytes(Path(recipe.model_path)),
            accuracy=measured["float"]["accuracy"],
            perplexity=measured["float"]["perplexity"],
        ),
        quantized=result,
        baseline=_baseline(measured, result),
        targets=TargetsResult(recipe.goals.max_drop_pct, met=drop <= recipe.goals.max_drop_pct),
        artifacts=artifacts,
        bench=found.get("bench"),
        stages=stages,
        bytes_by_class=held.bytes_by_class,
        block_errors=tuple(found["block_errors"]),
        fallbacks=tuple(Fallback(layer, reason) for layer, reason in sorted(held.notes.items())),
        warnings=tuple(dict.fromkeys(str(event["text"]) for event in events if event["event"] == "warning")),
        checked=_checked(recipe, artifacts),
        not_checked=_not_checked(recipe, artifacts),
        estimate=_compared(found.get("expected", ()), {"weight_bytes": result.bytes, **_cost(stages, events)}),
    )


def drop_pct(before: float, after: float) -> float:
    """Accuracy drop in percent of the float model's accuracy (docs/metrics.md)."""
    return 100.0 * (before - after) / before if before > 0 else 0.0


def _baseline(measured: Mapping[str, Any], result: QuantizedResult) -> BaselineResult | None:
    if "baseline" not in measured:
        return None
    drop = drop_pct(measured["float"]["accuracy"], measured["baseline"]["accuracy"])
    return BaselineResult(method="rtn", bytes=result.bytes, bits_per_weight=result.bits_per_weight, drop_pct=drop, **measured["baseline"])


def _artifact(item: Mapping[str, Any], parity: Mapping[str, Any]) -> ArtifactResult:
    check = parity.get(item["path"], {"checked": False})
    return ArtifactResult(item["format"], item["path"], item["bytes"], item["sha256"], Parity(**check))


def _stages(events: Sequence[Mapping[str, Any]]) -> tuple[StageResult, ...]:
    """One row per stage; the seconds of several attempts (an interrupted run, resumed) add up."""
    rows: dict[str, StageResult] = {}
    for event in events:
        if event["event"] == "stage" and event["state"] == "end":
            before = rows.get(event["name"])
            seconds = event["seconds"] + (before.seconds if before else 0.0)
            rows[event["name"]] = StageResult(event["name"], seconds, event["peak_rss_bytes"])
    return tuple(rows.values())


def _cost(stages: Sequence[StageResult], events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What quantizing took; nothing where it was interrupted, since what was done before that is not in its figures."""
    starts = [event for event in events if event["event"] == "stage" and (event["name"], event["state"]) == ("quantize", "start")]
    done = [stage for stage in stages if stage.name == "quantize"]
    return {"peak_bytes": done[0].peak_rss_bytes, "seconds": done[0].seconds} if done and len(starts) == 1 else {}


def _compared(expected: Sequence[Mapping[str, Any]], measured: Mapping[str, float]) -> dict[str, EstimateResult]:
    rows = {}
    for item in expected:
        before, after = item["value"], measured.get(item["what"])
        ratio = None if not before or after is None else after / before
        rows[item["what"]] = EstimateResult(before, after, ratio, item["basis"])
    return rows


def _checked(recipe: Recipe, artifacts: Sequence[ArtifactResult]) -> tuple[str, ...]:
    rows = []
    if recipe.evaluation is not None:
        rows.append(_measured_on(recipe.evaluation))
    return (*rows, *(f"{item.format}: {item.parity.how}" for item in artifacts if item.parity.checked))


def _measured_on(data: Calibration) -> str:
    if not data.seq_len:
        return f"accuracy on up to {data.samples} items of `{Path(data.data).name}`, by qhub's own reference"
    return f"accuracy on {data.samples} windows of {data.seq_len} tokens, stride {data.seq_len - 1}, each beginning with the start token"


def _not_checked(recipe: Recipe, artifacts: Sequence[ArtifactResult]) -> tuple[str, ...]:
    rows = [f"{item.format}: {item.parity.how}" for item in artifacts if not item.parity.checked]
    if recipe.target != "host":
        rows.append(f"nothing ran on `{recipe.target}` itself: figures are from this machine")
    return tuple(rows)
