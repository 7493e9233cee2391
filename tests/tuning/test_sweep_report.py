"""The report of a sweep: its trials as arms, what is said of them, and the figures for MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tuning.finished import make_sweep

from nestling.tracking import RunFolder
from nestling.tuning.comparison import ComparisonError, sweep_report


def test_a_sweep_is_told_in_words_and_figures(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path)
    report = sweep_report(folder, tmp_path)
    assert report.best == "period 16, rate 0.001"
    assert report.answer.startswith("period 16, rate 0.001 is best: ")
    assert "-0.097 ± 0.029 (paired over 3 seeds) against the next best, period 4, rate 0.001." in report.answer
    assert "Against the default, period 4, rate 0.003, it is -0.297 ± 0.029 (paired over 3 seeds)." in report.answer
    assert "2 of 5 arms did not finish" in report.answer

    rows = report.rows
    best_first = ["period 16, rate 0.001", "period 4, rate 0.001", "period 4, rate 0.003"]
    assert [row["arm"] for row in rows][:3] == best_first
    assert rows[0]["differs"] == {"period": "16", "rate": "0.001"} and rows[0]["seeds"] == [0, 1, 2]
    assert rows[0]["metrics"]["heldout_bits_per_byte"]["values"] == pytest.approx({0: 2.71, 1: 2.75, 2: 2.81})
    assert {row["arm"]: set(row["states"]) for row in rows[-2:]} == {
        "period 16, rate 0.003": {"stopped"},
        "period 3, rate 0.003": {"failed"},
    }

    assert report.page == folder.path / "report.html"
    page = report.page.read_text(encoding="utf-8")
    assert "How slow may the second level be?" in page and "3 is &lt;no&gt; multiple" in page
    assert "nestling sweep tuning/levels.yaml" in page
    assert set(report.figures) == {"by-parameter", "parallel", "by-cost", "level-frequencies", "heldout-bits_per_byte"}
    assert all(b"plotly.js" in path.read_bytes() for path in report.figures.values())

    (folder.path / "trials.jsonl").write_text(json.dumps(_only(folder)) + "\n")
    report = sweep_report(folder, tmp_path)
    assert report.best == "job" and "There is no other arm" in report.answer


def _only(folder: RunFolder) -> dict[str, Any]:
    """A trial of a sweep in which nothing varied."""
    line = (folder.path / "trials.jsonl").read_text().splitlines()[-2]
    return json.loads(line) | {"arm": "job", "values": {}, "state": "finished"}


def test_a_sweep_in_which_nothing_has_ended_is_said(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "sweeps", "levels")
    folder.write_config("name: levels\nobjectives: [{metric: heldout_bits_per_byte, mode: min}]\n")
    with pytest.raises(ComparisonError, match=f"sweep {folder.run_id} .levels, stopped. has no trial that ended"):
        sweep_report(folder, tmp_path)
