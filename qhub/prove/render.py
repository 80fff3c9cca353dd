"""How a Report looks: tables for the terminal, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qhub.prove.report import FloatResult, QuantizedResult, Report
from qhub.units import human_bytes, human_seconds

_METRICS = {"next_token_accuracy": "next-token accuracy"}
_ESTIMATED: dict[str, tuple[str, Callable[[float], str]]] = {
    "weight_bytes": ("size of the weights", human_bytes),
    "peak_bytes": ("memory while quantizing", human_bytes),
    "seconds": ("time to quantize", human_seconds),
    "tokens_per_s": ("tokens per second", "{:,.3g}".format),
}
_CSS = """
:root { color-scheme: light dark; --line: #8885; --good: #1a7f37; --bad: #b3261e; --bar: #4c7dd6; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .text td { text-align: left; } .met { color: var(--good); } .missed { color: var(--bad); }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: 2px; } code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class ReportTable:
    """One table: the first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> tuple[ReportTable, ...]:
    """The report as tables: the comparison, where the bytes are, what each stage cost, the artifacts; empty ones are left out."""
    stages = tuple((stage.name, human_seconds(stage.seconds), human_bytes(stage.peak_rss_bytes)) for stage in report.stages)
    found = (
        comparison(report),
        ReportTable("where the bytes are", ("tensors", "size", "share"), _class_rows(report)),
        ReportTable("stages", ("stage", "time", "peak memory"), stages),
        ReportTable("estimated and measured", ("", "estimated", "measured", "ratio", "basis"), _estimate_rows(report)),
        ReportTable(
            _speed_title(report), ("batch", "float p50", report.method + " p50", "p90", "p99", "items/s", "faster"), _speed_rows(report)
        ),
        ReportTable("artifacts", ("format", "size", "parity"), _artifact_rows(report)),
        ReportTable("layers that were treated differently", ("layer", "reason"), tuple((f.layer, f.reason) for f in report.fallbacks)),
    )
    return tuple(table for table in found if table.rows)


def comparison(report: Report) -> ReportTable:
    """Float, the baseline if there is one, and the chosen method, side by side."""
    chosen, baseline = report.quantized, report.baseline
    results: list[FloatResult | QuantizedResult] = [report.float_model, *([baseline] if baseline else []), chosen]
    columns = ["float", *([f"{baseline.method} (baseline)"] if baseline else []), report.method]
    metric = _METRICS.get(report.metric, report.metric.replace("_", " "))
    rows: list[tuple[str, ...]] = [
        ("size", *(human_bytes(result.bytes) for result in results)),
        ("bits per weight", *(_number(result, "bits_per_weight", "{:.2f}") for result in results)),
        (metric, *(_percent(result, "accuracy") for result in results)),
        ("perplexity", *(_number(result, "perplexity", "{:.4g}") for result in results)),
        ("mean KL", *(_number(result, "kl", "{:.3g}") for result in results)),
        ("top-1 agreement", *(_percent(result, "top1_agreement") for result in results)),
        ("mean cosine similarity", *(_number(result, "cosine", "{:.6f}") for result in results)),
        ("accuracy drop", *(_number(result, "drop_pct", "{:.2f} %") for result in results)),
        (f"drop ≤ {report.targets.max_drop_pct:g} %", *_verdicts(report, results)),
    ]
    kept = tuple(row for row in rows if any(cell != "–" for cell in row[1:]))
    return ReportTable(f"{report.model} → {report.target}, {report.scheme}", ("", *columns), kept)


def _speed_title(report: Report) -> str:
    bench = report.bench or {}
    return f"speed in {bench.get('runtime')}, {bench.get('threads')} threads"


def _speed_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """One row for each batch that was measured, beside the float network's in the same engine."""
    bench = report.bench or {}
    floats = (bench.get("float") or {}).get("batches") or [None] * len(bench.get("batches", ()))
    return tuple(_speed_row(row, other) for row, other in zip(bench.get("batches", ()), floats, strict=False))


def _speed_row(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> tuple[str, ...]:
    p50, p90, p99 = (row["latency_ms"][name] for name in ("p50", "p90", "p99"))
    before = None if other is None else other["latency_ms"]["p50"]
    compared = ("–", "–") if before is None else (f"{before:.3g} ms", f"{before / p50:.2f} ×")
    return (str(row["batch"]), compared[0], f"{p50:.3g} ms", f"{p90:.3g} ms", f"{p99:.3g} ms", f"{row['items_per_s']:,.4g}", compared[1])


def verdict(report: Report) -> str:
    """The result in one sentence."""
    met = "targets met" if report.targets.met else "targets not met"
    smaller = report.float_model.bytes / max(report.quantized.bytes, 1)
    drop = "not measured" if report.quantized.drop_pct is None else f"{report.quantized.drop_pct:.2f} %"
    return f"{met}: accuracy drop {drop} (at most {report.targets.max_drop_pct:g} %), {smaller:.1f} times smaller"


def to_html(report: Report) -> str:
    """One page that needs nothing else: no script, no external file; every text of the report is escaped."""
    state = "met" if report.targets.met else "missed"
    title = escape(f"{report.model} · {report.method} · {report.target}")
    facts = [("recipe", report.recipe_digest), ("scheme", report.scheme), ("measured on", report.host)]
    facts += [(artifact.format, f"{artifact.path} (sha256 {artifact.sha256})") for artifact in report.artifacts]
    body = [
        f'<h1>{title}</h1>\n<p class="{state}"><strong>{escape(verdict(report))}</strong></p>',
        _bars(report),
        *(_html_table(table) for table in tables(report)),
        *_html_lists(report),
        "<h2>facts</h2>\n<ul>" + "".join(f"<li>{escape(name)}: <code>{escape(text)}</code></li>" for name, text in facts) + "</ul>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{_CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _class_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    total = sum(report.bytes_by_class.values()) or 1
    by_size = sorted(report.bytes_by_class.items(), key=lambda item: -item[1])
    return tuple((name, human_bytes(count), f"{100 * count / total:.1f} %") for name, count in by_size)


def _estimate_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """What was estimated beside what was measured; what was not measured has no row."""
    rows = []
    for name, row in report.estimate.items():
        text, form = _ESTIMATED.get(name, (name.replace("_", " "), "{:.3g}".format))
        if row.measured is not None:
            before = "–" if row.estimated is None else form(row.estimated)
            rows.append((text, before, form(row.measured), "–" if row.ratio is None else f"{row.ratio:.2f}", row.basis))
    return tuple(rows)


def _artifact_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    rows = []
    for artifact in report.artifacts:
        parity = artifact.parity
        said = [] if parity.codes_identical is None else [f"codes {'identical' if parity.codes_identical else 'DIFFER'}"]
        if parity.max_abs_diff is not None:
            said.append(f"largest difference {parity.max_abs_diff:.2g}")
        if parity.top1_agreement is not None:
            said.append(f"same top-1 {100 * parity.top1_agreement:.4g} %")
        rows.append((artifact.format, human_bytes(artifact.bytes), ", ".join(said) if parity.checked and said else "not checked"))
    return tuple(rows)


def _number(result: FloatResult | QuantizedResult, name: str, form: str) -> str:
    value = getattr(result, name, None)
    return "–" if value is None else form.format(value)


def _percent(result: FloatResult | QuantizedResult, name: str) -> str:
    value = getattr(result, name, None)
    return "–" if value is None else f"{100 * value:.2f} %"


def _verdicts(report: Report, results: Sequence[FloatResult | QuantizedResult]) -> list[str]:
    verdicts = []
    for result in results:
        if result is report.quantized:
            verdicts.append("yes" if report.targets.met else "no")
        elif isinstance(result, QuantizedResult) and result.drop_pct is not None:
            verdicts.append("yes" if result.drop_pct <= report.targets.max_drop_pct else "no")
        else:
            verdicts.append("–")
    return verdicts


def _bars(report: Report) -> str:
    largest = max(report.float_model.bytes, report.quantized.bytes, 1)
    rows = ""
    for name, count in (("float", report.float_model.bytes), (report.method, report.quantized.bytes)):
        bar = f'<span class="bar" style="width:{max(30 * count / largest, 0.1):.1f}rem"></span>'
        rows += f"<tr><td>{escape(name)}</td><td>{bar}</td><td>{escape(human_bytes(count))}</td></tr>"
    return f'<table class="text">{rows}</table>'


def _html_table(table: ReportTable) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{escape(table.title)}</h2>\n<table><tr>{head}</tr>{rows}</table>"


def _html_lists(report: Report) -> list[str]:
    lists = (("warnings", report.warnings), ("checked", report.checked), ("not checked", report.not_checked))
    return [f"<h2>{name}</h2>\n<ul>" + "".join(f"<li>{escape(t)}</li>" for t in texts) + "</ul>" for name, texts in lists if texts]
