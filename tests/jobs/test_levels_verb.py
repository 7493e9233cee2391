"""`nestling levels`: what it shows of a job and of a run, and what it refuses before it computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from nestling.config import from_yaml, to_yaml
from nestling.jobs.app import app
from nestling.tracking import RunFolder

JOB = """
data: {sequence_length: 16}
model: {name: hope, vocab_size: 31, width: 16, layers: 1, heads: 2}
levels: [{width: 8, period: 1}, {width: 8, period: 4}]
training: {batch_tokens: 32}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "runs", "small")
    folder.config.write_text(to_yaml(from_yaml(JOB)))
    return folder


def levels(*arguments: object) -> dict[str, Any]:
    ended = CliRunner().invoke(app, ["levels", *map(str, arguments), "--json"])
    record = json.loads(ended.stdout.splitlines()[-1])
    assert ended.exit_code == (2 if "error" in record else 0), ended.output
    return record


def test_a_job(tmp_path: Path) -> None:
    record = levels("jobs/quickstart.yaml", f"run.dir={tmp_path}", "model.width=32")
    keys = "name level context objective rule updates_per_token parameters state_bytes flops_per_token".split()
    assert all(set(keys) <= set(part) for part in record["components"])
    assert record["figure"] == str(tmp_path / "levels-quickstart.png")
    picture = imread(tmp_path / "levels-quickstart.png")
    assert picture[:, :15].min() == 1 and picture[:, 15:].min() < 0.5  # labels keep away from the border


def test_a_run_as_it_is(run: RunFolder) -> None:
    place = f"run.dir={run.path.parent}"
    record = levels("small", place)
    assert record["figure"] == str(run.path / "levels.png") and (run.path / "levels.png").is_file()
    (run.path / "levels.png").unlink()
    assert "model.width: unknown key" in levels("small", "model.width=32", place)["error"]
    assert not (run.path / "levels.png").exists()


@pytest.mark.parametrize("width", [100, 160])
def test_everything_is_there_in_a_terminal(width: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = levels("small", f"run.dir={run.path.parent}")["components"]
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    shown = CliRunner().invoke(app, ["levels", "small", f"run.dir={run.path.parent}"]).stdout
    assert "\x1b[" in shown
    lines = click.unstyle(shown).splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert lines[0].split() == ["nested", "updates", "updates", "parameters", "FLOPs"]
    assert lines[1].split() == ["level", "component", "compresses", "/token", "/step", "or", "state", "/token"]
    for part, line in zip(parts, lines[2:], strict=False):
        assert part["name"] in line and f"{part['updates_per_token']:.3g}" in line and f" {part['context']} [" in line
        assert all(f" {part[key]:,.0f}" in line for key in ("parameters", "flops_per_token") if part[key])
    legend = " ".join(" ".join(lines[2 + len(parts) :]).split())
    assert all(f"{part['context']}: {part['objective']}; {part['rule']}" in legend for part in parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "neither a job file nor a run"),
        (["jobs/quickstart.yaml", "--figure", "x.gig"], "--figure: got x.gig, needs a file that ends in .png or .svg"),
        (["jobs/quickstart.yaml", "--figure", "{tmp}/x"], "needs a file that ends in .png or .svg"),
        (["jobs/quickstart.yaml", "--figure", "{tmp}/file/x.png"], "{tmp}/file is none; choose another place"),
        (["jobs/quickstart.yaml", "--figure", "/proc/x.png"], "--figure: got /proc, needs a place that can be written"),
        (["jobs/quickstart.yaml", "run.dir={tmp}/file/x"], "run.dir: got {tmp}/file/x, needs a folder"),
    ],
)
def test_refused_before_anything_is_computed(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nestling.training.nested", None)  # cannot be imported
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    (tmp_path / "file").touch()
    assert message.format(tmp=tmp_path) in levels(*(part.format(tmp=tmp_path) for part in arguments))["error"]
    assert not (tmp_path / "runs").exists()
