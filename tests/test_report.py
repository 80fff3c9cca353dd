"""The report: as JSON and back, as tables, as a page."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest

from qhub.errors import QhubError
from qhub.prove.render import comparison, tables, to_html, verdict
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
    load,
)

CONTRACT = (
    *("recipe_digest", "model", "target", "host", "metric", "float", "quantized", "baseline"),
    *("targets", "artifacts", "bench", "stages", "tuning"),
)
REPORT = Report(
    recipe_digest="abc",
    model="demo:llm",
    target="host",
    host="a machine",
    method="awq",
    scheme="w4a16-g128-asym",
    metric="next_token_accuracy",
    float_model=FloatResult(6_000_000, 0.5, 10.0),
    quantized=QuantizedResult(2_000_000, 4.25, 0.495, 10.25, 1.0, 0.0123, 0.91),
    baseline=BaselineResult(2_000_000, 4.25, 0.48, 11.5, 4.0, 0.05, 0.85),
    targets=TargetsResult(2.0, met=True),
    artifacts=(ArtifactResult("compressed-tensors", "quantized", 2_000_000, "f00", Parity(True, 1.5e-6, True, "logits of 64 tokens")),),
    stages=(StageResult("quantize", 12.3, 300_000_000),),
    bytes_by_class={"scales": 200_000, "codes": 1_800_000},
    block_errors=(0.01, 0.02),
    fallbacks=(Fallback("layers.0.mlp", "its Hessian is zero"),),
    warnings=("little data",),
    checked=("codes read back identical",),
    not_checked=("vLLM",),
    estimate={
        "weight_bytes": EstimateResult(2_100_000, 2_000_000, 0.952, "shapes and bits"),
        "seconds": EstimateResult(None, 12.3, None, "unknown before a first run on this machine"),
        "tokens_per_s": EstimateResult(120.0, None, None, "bandwidth"),
    },
)


def test_report_json_has_the_fields_of_the_contract():
    data = REPORT.to_json()
    assert [name for name in CONTRACT if name not in data] == []
    assert data["float"] == {"bytes": 6_000_000, "accuracy": 0.5, "perplexity": 10.0}
    assert set(data["quantized"]) == {
        "bytes", "bits_per_weight", "accuracy", "perplexity", "drop_pct", "kl", "top1_agreement", "cosine",
    }  # fmt: skip
    assert data["baseline"] == {
        **data["quantized"],
        "method": "rtn",
        "accuracy": 0.48,
        "perplexity": 11.5,
        "drop_pct": 4.0,
        "kl": 0.05,
        "top1_agreement": 0.85,
    }
    assert data["targets"] == {"max_drop_pct": 2.0, "met": True}
    assert data["artifacts"][0]["parity"] == {
        "checked": True,
        "max_abs_diff": 1.5e-6,
        "codes_identical": True,
        "how": "logits of 64 tokens",
        "top1_agreement": None,
    }
    assert data["stages"] == [{"name": "quantize", "seconds": 12.3, "peak_rss_bytes": 300_000_000}]


def test_report_round_trips_through_json():
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_report_without_what_may_be_missing_round_trips():
    bare = dataclasses.replace(REPORT, baseline=None, artifacts=(), stages=(), fallbacks=(), bytes_by_class={}, bench=None)
    assert Report.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_a_field_of_a_later_version_is_ignored():
    assert Report.from_json({**REPORT.to_json(), "invented_later": 1}) == REPORT


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "`report` is not an object"),
        (("model",), 3, "`report.model` is `3`, not a text"),
        (("float",), None, "`report.float` is not an object"),
        (("float", "bytes"), "6", "`report.float.bytes` is `6`, not a whole number"),
        (("float", "bytes"), True, "`report.float.bytes` is `True`, not a whole number"),
        (("float", "accuracy"), None, "`report.float.accuracy` is `None`, not a number"),
        (("targets", "met"), 1, "`report.targets.met` is `1`, not true or false"),
        (("stages",), {}, "`report.stages` is `{}`, not a list"),
        (("stages",), [{"name": "x"}], "`report.stages[0].seconds` is missing"),
        (("bytes_by_class",), [], "`report.bytes_by_class` is `[]`, not an object"),
        (("warnings",), [1], "`report.warnings[0]` is `1`, not a text"),
    ],
)
def test_wrong_field_is_named(path, value, message):
    data = REPORT.to_json()
    if path:
        inner = data
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
    with pytest.raises(QhubError) as caught:
        Report.from_json(data if path else value)
    assert caught.value.message == message


@pytest.mark.parametrize("name", ["recipe_digest", "float", "quantized", "targets"])
def test_missing_field_is_named(name):
    data = REPORT.to_json()
    del data[name]
    with pytest.raises(QhubError) as caught:
        Report.from_json(data)
    assert caught.value.message == f"`report.{name}` is missing"


def test_report_is_saved_and_loaded_by_directory_or_file(tmp_path):
    path = REPORT.save(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]
    assert load(tmp_path) == load(path) == REPORT


def test_run_without_a_report_says_how_to_finish_it(tmp_path):
    with pytest.raises(QhubError) as caught:
        load(tmp_path)
    assert caught.value.hint == "give the directory that `qhub run` named at its end"
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(QhubError) as caught:
        load(tmp_path)
    assert caught.value.message == f"`{tmp_path}` has no report.json: it is not a run, or the run did not finish"
    assert caught.value.hint == f"finish it: `qhub run --resume --out {tmp_path}`"


def test_directory_that_does_not_exist_is_said_so(tmp_path):
    with pytest.raises(QhubError) as caught:
        load(tmp_path / "gone")
    assert caught.value.message == f"`{tmp_path / 'gone'}` does not exist"


@pytest.mark.parametrize(
    ("content", "why"), [("{", "is not JSON: "), ("[]", "is not a report: `report` is not an object")], ids=["cut", "list"]
)
def test_broken_report_is_refused(tmp_path, content, why):
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(QhubError) as caught:
        load(tmp_path)
    assert caught.value.message.startswith(f"`{tmp_path / 'report.json'}` {why}")


def test_comparison_shows_float_baseline_and_method_side_by_side():
    table = comparison(REPORT)
    assert table.title == "demo:llm → host, w4a16-g128-asym"
    assert table.columns == ("", "float", "rtn (baseline)", "awq")
    assert table.rows == (
        ("size", "6 MB", "2 MB", "2 MB"),
        ("bits per weight", "–", "4.25", "4.25"),
        ("next-token accuracy", "50.00 %", "48.00 %", "49.50 %"),
        ("perplexity", "10", "11.5", "10.25"),
        ("mean KL", "–", "0.05", "0.0123"),
        ("top-1 agreement", "–", "85.00 %", "91.00 %"),
        ("accuracy drop", "–", "4.00 %", "1.00 %"),
        ("drop ≤ 2 %", "–", "no", "yes"),
    )


def test_comparison_without_a_baseline_has_no_column_for_it():
    table = comparison(dataclasses.replace(REPORT, baseline=None))
    assert table.columns == ("", "float", "awq")


def test_rows_that_nobody_measured_are_left_out():
    unmeasured = dataclasses.replace(
        REPORT, baseline=None, float_model=FloatResult(9, 0.5), quantized=QuantizedResult(3, 4.0, 0.5, drop_pct=0.0)
    )
    assert [row[0] for row in comparison(unmeasured).rows] == [
        "size",
        "bits per weight",
        "next-token accuracy",
        "accuracy drop",
        "drop ≤ 2 %",
    ]


def test_other_tables_show_bytes_stages_artifacts_and_fallbacks():
    _, classes, stages, estimate, artifacts, fallbacks = tables(REPORT)
    assert classes.rows == (("codes", "1.8 MB", "90.0 %"), ("scales", "200 kB", "10.0 %"))
    assert stages.rows == (("quantize", "12 s", "300 MB"),)
    assert estimate.rows == (
        ("size of the weights", "2.1 MB", "2 MB", "0.95", "shapes and bits"),
        ("time to quantize", "–", "12 s", "–", "unknown before a first run on this machine"),
    )
    assert artifacts.rows == (("compressed-tensors", "2 MB", "codes identical, largest difference 1.5e-06"),)
    assert fallbacks.rows == (("layers.0.mlp", "its Hessian is zero"),)


def test_parity_that_was_not_checked_is_said_so():
    artifact = dataclasses.replace(REPORT.artifacts[0], parity=Parity(checked=False))
    assert tables(dataclasses.replace(REPORT, artifacts=(artifact,)))[4].rows[0][-1] == "not checked"


def test_verdict_is_one_sentence():
    assert verdict(REPORT) == "targets met: accuracy drop 1.00 % (at most 2 %), 3.0 times smaller"


class Page(html.parser.HTMLParser):
    """Collects the tags, links and text of a page, and checks that tags are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_well_formed_and_needs_nothing_else():
    page = Page(to_html(REPORT))
    assert page.links == []
    assert "script" not in page.tags
    assert "http" not in to_html(REPORT)
    for text in ("demo:llm", "10.25", "codes identical", "targets met", "little data", "vLLM", "its Hessian is zero"):
        assert text in page.text


def test_page_escapes_every_text():
    evil = '<script>alert(1)</script>&"'
    fields = ("recipe_digest", "model", "target", "host", "method", "scheme", "metric")
    report = dataclasses.replace(
        REPORT,
        **dict.fromkeys(fields, evil),
        warnings=(evil,),
        checked=(evil,),
        bytes_by_class={evil: 1},
        fallbacks=(Fallback(evil, evil),),
        stages=(StageResult(evil, 1.0, 1),),
        artifacts=(ArtifactResult(evil, evil, 1, evil),),
    )
    page = Page(to_html(report))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 12
