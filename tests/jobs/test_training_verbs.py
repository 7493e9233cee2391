"""`train`, `evaluate` and `generate` as a person runs them, on a model that trains in seconds.

Each in a process of its own once, otherwise in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.in_process import nestling, result

ROOT = Path(__file__).parents[2]
TINY = [
    *("training.workers=1", "training.zero_stage=0", "training.batch_tokens=128", "training.log_every=1"),
    "training.warmup_steps=2",
    *("data.sequence_length=64", "model.width=32", "model.heads=1", "levels=[{width: 32, period: 2}]"),
    *("evaluation.tokens=128", "evaluation.final_tokens=256"),
]

pytestmark = pytest.mark.slow


def command(runs: Path, *arguments: str) -> dict[str, Any]:
    """Arguments of subprocess.run and subprocess.Popen."""
    environment = dict(os.environ) | {"NESTLING_RUNS": str(runs)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"args": [sys.executable, "-m", "nestling.jobs.app", *arguments], "env": environment, "cwd": ROOT, **pipes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs: Path) -> dict[str, Any]:
    """What `train --json` said about a run that finished."""
    ended = subprocess.run(**command(runs, "train", "quickstart", *TINY, "training.steps=4", "--json"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    lines = ended.stderr.splitlines()
    assert lines[0].endswith("ray.log") and lines[1] == "starting Ray, preparing data"
    assert all(line.startswith("step ") for line in lines[2:])
    return json.loads(ended.stdout)


def test_train(trained: dict[str, Any]) -> None:
    known = {"run_id", "status", "steps", "tokens", "train_loss", "heldout_bits_per_byte", "unigram_bits_per_byte"}
    assert trained.keys() == known | {
        "tokens_per_second",
        "checkpoint",
        "run_dir",
        "tracking_uri",
        "skipped_steps",
        "data",
    }
    assert (trained["status"], trained["steps"], trained["tokens"]) == ("finished", 4, 512)
    assert (Path(trained["run_dir"]) / "ray.log").stat().st_size > 0


def test_evaluate(runs: Path, trained: dict[str, Any]) -> None:
    ended = subprocess.run(**command(runs, "evaluate", trained["run_id"], "--json"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["run_id"] == trained["run_id"]
    assert found["heldout_bits_per_byte"] == pytest.approx(trained["heldout_bits_per_byte"], rel=1e-4)
    assert found["unigram_bits_per_byte"] == trained["unigram_bits_per_byte"]
    assert found.keys() >= {"heldout_loss", "tokens"}


def test_a_part_of_an_evaluation_leaves_its_record_alone(runs: Path, trained: dict[str, Any]) -> None:
    record = Path(trained["run_dir"]) / "evaluation.json"
    before = record.read_text()
    for part in (("--tokens", "128"), ("evaluation.final_tokens=128",)):
        assert result(runs, "evaluate", trained["run_id"], *part)["tokens"] == 128
    assert record.read_text() == before


def test_generate(runs: Path, trained: dict[str, Any]) -> None:
    arguments = ("generate", "latest", "--prompt", "The ", "--max-tokens", "12", "--seed", "3")
    found = result(runs, *arguments)
    assert found.keys() == {"run_id", "text", "tokens", "tokens_per_second", "fast_state"}
    assert found["run_id"] == trained["run_id"] and 0 < found["tokens"] <= 12
    assert result(runs, *arguments)["text"] == found["text"]
    ended = subprocess.run(**command(runs, *arguments))
    assert ended.returncode == 0
    assert len(ended.stdout) == len(found["text"]) + 1  # control characters are shown as pictures


def test_levels_that_move_while_reading(ray_local: None, runs: Path) -> None:
    """Trained through their moves, evaluated and sampled with them; a verb can also have the levels still."""
    moving = ("continuum.drive=meta", "continuum.periods=[8]", "continuum.rates=[1.0]", "run.name=moving")
    summary = result(runs, "train", "quickstart", *TINY, *moving, "training.steps=4")
    found = result(runs, "evaluate", "moving")
    still = result(runs, "evaluate", "moving", "continuum.drive=schedule")
    assert found["heldout_bits_per_byte"] == pytest.approx(summary["heldout_bits_per_byte"], rel=1e-4)
    assert found["levels_moving_bits_per_byte"] == pytest.approx(found["heldout_bits_per_byte"])
    assert found["levels_still_bits_per_byte"] == pytest.approx(still["heldout_bits_per_byte"], rel=1e-6)
    assert found["heldout_loss"] != pytest.approx(still["heldout_loss"], rel=1e-5)
    assert still["levels_still_bits_per_byte"] is None
    sample = ("generate", "moving", "--prompt", "The quick brown fox", "--max-tokens", "40")
    assert len({result(runs, *sample, *rates)["text"] for rates in ((), ("continuum.rates=[0.0]",))}) == 2
    code, _, said = nestling(runs, "evaluate", "moving", "continuum.rates=[1.0e+30]")
    assert code == 1 and "the levels diverged while they read: lower continuum.rates" in said
    code, _, said = nestling(runs, "generate", "moving", "--prompt", "", "continuum.rate=[1.0]")
    assert code == 2 and "the nearest known one is continuum.rates" in said


def test_a_training_learns_a_document(ray_local: None, runs: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    """It has no probes: what shows what became of the old is its held-out text."""
    document, run_id, folder = tmp_path / "text", trained["run_id"], Path(trained["run_dir"])
    document.write_text("one, two, three, four, five, six, seven. " * 10)
    weights = (folder / "model.safetensors").read_bytes()
    plain = result(runs, "evaluate", run_id)["heldout_loss"]
    read = result(runs, "learn", run_id, str(document), "--fast")
    primed = result(runs, "evaluate", run_id)
    assert primed["fast_state"] == [str(document)] and primed["heldout_loss"] != plain
    assert result(runs, "evaluate", run_id, "--no-fast")["heldout_loss"] == plain
    assert (folder / "model.safetensors").read_bytes() == weights
    ended = subprocess.run(**command(runs, "learn", run_id, str(document), "--json"))  # a process group of its own
    assert ended.returncode == 0, ended.stderr
    learnt = json.loads(ended.stdout)
    assert learnt["probes"].keys() == read["probes"].keys() == {"held-out"}
    (found,) = learnt["documents"]
    assert found["after"] < found["before"] and learnt["steps"] == 16
    assert result(runs, "runs")["runs"][0]["steps"] == 4 + 16
    assert (folder / "model.safetensors").read_bytes() != weights
    result(runs, "resume", run_id, "training.steps=22")


def test_a_training_that_fails_says_why_and_where_the_log_is(ray_local: None, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("too little\n")
    code, found, said = nestling(runs, "train", "quickstart", f"data.source={tmp_path}/text")
    assert code == 1
    assert "Traceback" not in said
    log = Path(found["run_dir"]) / "ray.log"
    assert found["status"] == "failed" and str(log) in said
    assert found["error"] in said
    assert "Traceback" in log.read_text()
