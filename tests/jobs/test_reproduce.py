"""`nestling reproduce` as a person and a program call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nestling.jobs.app import app
from nestling.tracking import RunFolder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "NESTLING_RUNS"):
        monkeypatch.delenv(variable, raising=False)


def nestling(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def result(ended: Result) -> dict[str, Any]:
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_experiment_ends_with_its_table(ray_local: None, tmp_path: Path) -> None:
    ended = nestling("reproduce", "two-timescales", "--json", "run.dir=all runs", "--docs", "docs/results")
    assert ended.exit_code == 0, ended.output
    found = result(ended)
    assert found["name"] == "two-timescales" and found["seconds"] > 0
    ours = {(row["model"], row["metric"]): row["ours"] for row in found["rows"]}
    assert ours["one level, rate 0.05 (as published)", "final slope"] == pytest.approx(1.7994, abs=1e-4)
    assert ours["two levels, 0.05 / 0.8, retention 0.5 (as published)", "final slope"] == pytest.approx(
        2.0883, abs=1e-4
    )
    assert {row["seeds"] for row in found["rows"]} == {1}
    assert found["table"] == "docs/results/reproduce-two-timescales.md" and Path(found["table"]).exists()
    assert Path(found["figure"]).stat().st_size > 10_000
    assert "`nestling reproduce two-timescales --docs docs/results`" in Path(found["table"]).read_text()
    folder = RunFolder.open(found["run_dir"])
    assert folder.path.parent == tmp_path / "all runs/reproductions" and folder.status() == "finished"
    assert len((folder.path / "trials.jsonl").read_text().splitlines()) == 13
    before = {path.name: path.read_bytes() for path in Path("docs/results").iterdir()}
    again = nestling("reproduce", "two-timescales", "--seeds", "2", "run.dir=all runs")
    assert again.exit_code == 0, again.output
    assert "1.7994 ±" not in again.stdout and "one level, rate 0.05 (as published)" in again.stdout
    (table,) = set(Path("all runs").glob("reproductions/*/*.md")) - {
        folder.path.relative_to(tmp_path) / Path(found["table"]).name
    }
    assert "`nestling reproduce two-timescales --seeds 2`" in table.read_text()
    assert {path.name: path.read_bytes() for path in Path("docs/results").iterdir()} == before  # only with --docs


def test_what_is_wrong_is_told_before_anything_starts(tmp_path: Path) -> None:
    ended = nestling("reproduce", "formal-language", "--json")
    assert ended.exit_code == 2
    assert "did you mean formal-languages?" in result(ended)["error"]
    assert set(result(ended)) == {"name", "seconds", "rows", "figure", "table", "run_dir", "error"}
    ended = nestling("reproduce", "mqar", "--json", "training.steps=3")
    assert ended.exit_code == 2 and "training.steps: unknown key" in result(ended)["error"]
    assert nestling("reproduce", "mqar", "--seeds", "0").exit_code == 2
    (tmp_path / "afile").touch()
    ended = nestling("reproduce", "mqar", "--json", "--docs", "afile/results")
    assert ended.exit_code == 2
    assert result(ended)["error"].startswith("--docs: cannot write in afile/results: ")
    assert not (tmp_path / "runs").exists()


def test_mlflow_away_is_told_with_the_default_and_ends_the_run(tmp_path: Path) -> None:
    ended = nestling("reproduce", "two-timescales", "--json", "run.dir=all", "tracking.uri=http://127.0.0.1:9")
    assert ended.exit_code == 1
    assert f"with neither, the run is tracked in {tmp_path}/all/mlflow.db" in result(ended)["error"]
    written = json.loads((Path(result(ended)["run_dir"]) / "run.json").read_text())
    assert written["status"] == "failed" and written["finished"]


def test_ctrl_c_in_the_first_seconds_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: RunFolder, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_config", interrupted)
    ended = nestling("reproduce", "two-timescales", "--json", "run.dir=all")
    assert ended.exit_code == 130
    assert json.loads((Path(result(ended)["run_dir"]) / "run.json").read_text())["status"] == "interrupted"
