"""The table of routes.yaml, row by row, and that it covers every row of the guides that the flowchart comes from."""

from __future__ import annotations

import subprocess
import sys

import pytest
import routes_table as table
from profiles import MODELS

from qhub import NoRouteError
from qhub.route.matrix import rows

ENOUGH = 60


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.title)
def test_an_expert_answers(row):
    if row.refused:
        with pytest.raises(NoRouteError) as caught:
            row.recommend()
        assert row.refused in str(caught.value)
        return
    found = row.recommend()
    route = found.routes[0]
    ((_, method, scheme, finisher, *_),) = rows(found, [row.device], table.REGISTRY)
    assert (method, scheme, finisher) == row.first
    assert route.fits == row.fits
    said = (*route.reasons, *route.warnings, route.estimates.basis)
    assert any(row.because in text for text in said), said
    for what, why in row.rejected.items():
        assert any(item.route == f"{row.target}: {what}" and why in item.reason for item in found.rejected), what
    if row.size:
        assert row.size[0] <= route.estimates.weight_bytes / 1e6 <= row.size[1]


@pytest.mark.parametrize("row", [row for row in table.ROWS if not row.refused], ids=lambda row: row.title)
def test_every_answer_has_a_path_estimates_and_what_is_missing(row):
    for route in row.recommend().routes:
        assert route.path[0].node == "B"
        assert route.estimates.weight_bytes
        assert "accuracy: " in route.estimates.basis
        assert route.runtime or route.missing or not table.REGISTRY.finishers(row.device, MODELS[row.model].task)


def test_the_table_is_large_enough():
    assert len(table.ROWS) >= ENOUGH


def test_every_row_of_the_guides_is_covered_by_a_row_of_the_table():
    covered = {seed for row in table.ROWS for seed in row.seeds} | set(table.ELSEWHERE)
    assert [seed for seed in table.SEEDS if seed not in covered] == []
    assert sorted(covered - set(table.SEEDS)) == []
    assert len(table.ELSEWHERE) < len(table.SEEDS) / 10


def test_docs_seed_coverage_is_current():
    command = [sys.executable, str(table.HERE / "routes_table.py")]
    assert subprocess.run([*command, "--check"], capture_output=True, text=True, check=False).stderr == ""
