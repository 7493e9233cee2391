"""`nestling compare` as a person and a program call it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.tuning.finished import make_run, make_sweep
from typer.testing import CliRunner, Result

from nestling.jobs.app import app
from nestling.tracking import RunFolder


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def nestling(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def result(ended: Result) -> dict[str, Any]:
    (line,) = ended.stdout.splitlines()
    return json.loads(line)


def test_runs_beside_each_other(runs: Path, tmp_path: Path) -> None:
    ids = [make_run(runs, "quick", [f"seed={seed}"], [5.0, 4.0 + seed]).run_id for seed in (0, 1)]
    slow = make_run(runs, "slow", ["levels.1.period=16"], [5.0, 4.5])
    told = nestling(*ids, "slow")
    assert told.exit_code == 0, told.stderr
    heading, quick, other, _, answer, *_ = told.stdout.splitlines()
    assert heading.split()[:3] == ["arm", "levels.1.period", "seeds"] and "held out, b/B" in heading
    assert quick.split()[:6] == ["quick", "4", "2", "4.5", "±", "6.4"]
    assert other.split()[:4] == ["slow", "16", "1", "4.5000"]
    assert answer.startswith("quick has the best mean, 4.5 ± 6.4 (held out, b/B)")
    page = runs / f"compare-{'-'.join([*ids, slow.run_id])}.html"
    assert f"page: {page}" in told.stderr

    out = tmp_path / "new place" / "page.html"
    found = result(nestling(*ids, "slow", "--out", out, "--json"))
    assert found["report"] == str(out) and [row["runs"] for row in found["rows"]] == [ids, [slow.run_id]]
    assert found["rows"][0]["metrics"]["heldout_bits_per_byte"]["values"] == {"0": 4.0, "1": 5.0}
    assert found["rows"][1]["metrics"]["heldout_bits_per_byte"]["half"] is None
    made = f"nestling compare {' '.join(ids)} {slow.run_id} --out {shlex.quote(str(out))}"
    text = out.read_text(encoding="utf-8").partition("<footer>")[2].partition("</footer>")[0]
    assert made.replace("'", "&#x27;") in text
    first = out.read_bytes()
    assert nestling(*ids, "slow", "--out", out).exit_code == 0 and out.read_bytes() == first


def test_a_sweep(runs: Path, tmp_path: Path) -> None:
    folder = make_sweep(runs)
    found = result(nestling("--sweep", "levels", "--json"))
    assert found["report"] == str(folder.path / "report.html")
    assert [row["arm"] for row in found["rows"]][0] == "period 16, rate 0.001"
    told = nestling("--sweep", folder.run_id, "--out", tmp_path / "copy.html")
    assert "period 16, rate 0.001 is best" in told.stdout
    assert (tmp_path / "copy.html").read_bytes() == (folder.path / "report.html").read_bytes()


def test_what_cannot_be_compared(runs: Path, tmp_path: Path) -> None:
    nothing = nestling("--sweep", "levels")
    assert nothing.exit_code == 2 and "there are no sweeps in" in nothing.stderr
    run, empty = make_run(runs, "quick"), RunFolder.create(runs, "empty")
    before = sorted(runs.iterdir())
    for arguments, said in (
        ([], "got no run, needs at least two different ones"),
        (["quick"], f"got only run {run.run_id} (quick), needs at least two different ones"),
        (["quick", run.run_id], "needs at least two different ones"),
        (["quick", "quack"], "no run 'quack' in"),
        (["quick", "empty"], f"run {empty.run_id} (empty, stopped) has logged no step"),
        (["quick", "empty", "--out", "page.png"], "--out: got page.png, needs a file that ends in .html"),
        (["quick", "empty", "--out", str(run.config / "page.html")], "--out: got"),
        (["quick", "--sweep", "levels"], "--sweep: got levels and runs (quick), needs one of the two"),
        (["quick", "empty", "training.steps=3"], "training.steps: "),
    ):
        ended = nestling(*arguments, "--json")
        assert ended.exit_code == 2 and said in ended.stderr, ended.stderr
        assert result(ended)["report"] is None and result(ended)["error"]
    assert sorted(runs.iterdir()) == before
