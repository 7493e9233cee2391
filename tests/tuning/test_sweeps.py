"""Whole sweeps with a real Ray: every searcher and scheduler, failures, and going on after a driver was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nestling.config import load
from nestling.config.load import changed, read_job
from nestling.jobs.app import app
from nestling.tracking import RunFolder
from nestling.tracking.client import connect
from nestling.tuning.sweeps import load_sweep
from nestling.tuning.sweeps.outcome import Lines, Outcome, trial_folders
from nestling.tuning.sweeps.plan import make_folder, make_plan, open_plan
from nestling.tuning.sweeps.run import Result, run_sweep

JOB: dict[str, Any] = {
    "model": {"name": "hope", "width": 16, "layers": 1, "heads": 2, "chunk_size": 16},
    "levels": [{"width": 8, "period": 1}, {"width": 8, "period": 2}],
    "training": {"batch_tokens": 128, "warmup_steps": 2, "checkpoint_every": 5, "evaluate_every": 0},
    "evaluation": {"tokens": 1024, "final_tokens": 1024},
    "checkpoint": {"keep": 9},
}
GRID: dict[str, Any] = {"space": {"training.learning_rate": [3e-3, 1e-6]}, "seeds": 2, "budget": {"tokens": 2560}}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def written(place: Path, runs_dir: Path, texts: Path, name: str, **settings: Any) -> Path:
    """A sweep file of the small job."""
    job = JOB | {"data": {"source": str(texts), "sequence_length": 64}, "run": {"dir": str(runs_dir)}}
    (place / "job.yaml").write_text(yaml.safe_dump(job))
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"job": str(place / "job.yaml"), **settings}))
    return file


def swept(file: Path, runs_dir: Path) -> tuple[RunFolder, Result, dict[tuple[str, int], Outcome]]:
    config = load_sweep(file)
    plan = make_plan(config, changed(read_job(config.job), config.overrides), "")
    folder = make_folder(runs_dir, plan)
    return folder, run_sweep(plan, folder, lambda outcome: None), Lines(folder).outcomes()


def without_time(outcomes: dict[tuple[str, int], Outcome]) -> dict[tuple[str, int], Any]:
    return {key: (each.state, each.objectives, each.cost["tokens"]) for key, each in outcomes.items()}


@pytest.fixture(scope="module")
def grid(
    ray_local: None, tmp_path_factory: pytest.TempPathFactory, runs_dir: Path, texts: Path
) -> tuple[RunFolder, Result, dict[tuple[str, int], Outcome]]:
    """A grid that nothing happens to, one of whose arms cannot be trained."""
    place = tmp_path_factory.mktemp("grid")
    (place / "nothing").mkdir()
    space = GRID["space"] | {"data.source": [str(texts), str(place / "nothing")]}
    return swept(written(place, runs_dir, texts, "grid", **GRID | {"space": space}), runs_dir)


def test_a_grid_trains_every_arm_with_every_seed_and_a_broken_one_fails_alone(grid: Any, runs_dir: Path) -> None:
    folder, result, outcomes = grid
    assert (result.trials, result.completed, len(result.failed)) == (8, 4, 4)
    assert all("nothing" in str(each.error) and each.objectives == {} for each in result.failed)
    finished = [each for each in outcomes.values() if each.state == "finished"]
    assert {each.cost["tokens"] for each in finished} == {2560}
    assert result.found.best is not None and "learning_rate 0.003" in result.found.best
    runs = trial_folders(runs_dir, folder.run_id)
    assert set(runs) == set(outcomes)


def test_the_winner_is_a_job_file_and_trials_are_no_clutter(grid: Any, runs_dir: Path, tmp_path: Path) -> None:
    folder, result, _ = grid
    place = f"run.dir={runs_dir}"
    printed = CliRunner().invoke(app, ["best", folder.run_id, place])
    assert printed.exit_code == 0
    (tmp_path / "best.yaml").write_text(printed.stdout)
    job = load(tmp_path / "best.yaml")
    assert (job.training.learning_rate, job.training.steps, job.run.name) == (3e-3, 20, "grid-best")
    listed = [
        json.loads(CliRunner().invoke(app, ["runs", place, "--json", *more]).stdout) for more in ([], ["--trials"])
    ]
    shown, everything = ({run["run_id"] for run in each["runs"]} for each in listed)
    trials = {each.run_id for each in trial_folders(runs_dir, folder.run_id).values()}
    assert trials <= everything and not trials & shown


def test_trials_are_children_of_the_sweep_in_mlflow(grid: Any, runs_dir: Path) -> None:
    folder, result, outcomes = grid
    client = connect(folder.info()["tracking_uri"])
    parent = client.get_run(result.parent_run_id)
    assert parent.info.status == "FINISHED" and parent.data.params["seeds"] == "2"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.parent_run_id}'", max_results=50
    )
    trained = {child.data.tags["nestling.run_id"]: child for child in children}
    for outcome in outcomes.values():
        if outcome.state != "finished":
            continue
        child = trained[str(outcome.run_id)]
        assert child.data.tags["nestling.arm"] == outcome.arm and child.data.tags["nestling.seed"] == str(outcome.seed)
        assert child.data.metrics["cost/tokens"] == 2560
        assert child.data.metrics["objective/heldout_bits_per_byte"] == outcome.objectives["heldout_bits_per_byte"]


def test_successive_halving_stops_what_is_behind_at_a_rung(
    ray_local: None, tmp_path: Path, runs_dir: Path, texts: Path
) -> None:
    # Three run at once, so the last one, which is the worst, comes to its rung when there is something to compare with.
    settings = GRID | {"space": {"training.learning_rate": [3e-3, 1e-3, 3e-4, 1e-4, 1e-6]}, "seeds": 1}
    file = written(tmp_path, runs_dir, texts, "asha", **settings, scheduler="asha", asha={"rungs": 1, "factor": 2})
    folder, _, outcomes = swept(file, runs_dir)
    states = {each.arm: (each.state, each.cost["tokens"]) for each in outcomes.values()}
    assert states["learning_rate 0.003"] == ("finished", 2560)
    assert states["learning_rate 1e-06"] == ("stopped", 1280)
    stopped = next(each for each in outcomes.values() if each.state == "stopped")
    run = trial_folders(runs_dir, folder.run_id)[stopped.arm, stopped.seed]
    assert run.status() == "interrupted" and (run.path / "checkpoints" / "step-00000010").is_dir()
    assert stopped.objectives["heldout_bits_per_byte"] == run.records()[-1]["heldout/bits_per_byte"]
    # Going on with it, the driver stands by what it had decided, and does not train what it had stopped.
    lines = Lines(folder).path
    lines.write_text("".join(line for line in lines.open() if "learning_rate 0.003" not in line))
    run_sweep(open_plan(folder), folder, lambda outcome: None)
    assert Lines(folder).outcomes() == outcomes


@pytest.mark.parametrize("metrics", [["heldout_bits_per_byte"], ["heldout_bits_per_byte", "parameters"]])
def test_optuna_asks_for_possible_arms_and_is_told_the_mean_over_the_seeds(
    ray_local: None, tmp_path: Path, runs_dir: Path, texts: Path, metrics: list[str]
) -> None:
    import optuna

    seeds = 2 if len(metrics) == 1 else 1
    settings = {
        "space": {
            "training.learning_rate": {"log_uniform": [1e-4, 1e-1]},
            "model.width": [12, 16],
            "model.heads": [2, 8],
        },
        "searcher": "optuna",
        "objectives": [{"metric": metric} for metric in metrics],
        "seeds": seeds,
        "budget": {"tokens": 640, "trials": 3},
    }
    folder, result, outcomes = swept(written(tmp_path, runs_dir, texts, "optuna", **settings), runs_dir)
    assert (result.completed, len(result.failed)) == (3 * seeds, 0)
    study = optuna.load_study(study_name="optuna", storage=f"sqlite:///{folder.path / 'optuna.db'}")
    told = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    arms = {each.arm for each in outcomes.values()}
    for place, metric in enumerate(metrics):
        means = [sum(e.objectives[metric] for e in outcomes.values() if e.arm == arm) / seeds for arm in arms]
        assert sorted(trial.values[place] for trial in told) == pytest.approx(sorted(means))
    assert not any(trial.params["model.width"] == "12" and trial.params["model.heads"] == "8" for trial in told)


def test_a_population_copies_its_best_to_the_bit_and_goes_on_with_other_settings(
    ray_local: None, tmp_path: Path, runs_dir: Path, texts: Path
) -> None:
    from nestling.checkpoint import run_store
    from nestling.evaluation.run import evaluate
    from nestling.training.resume import job_of
    from nestling.training.takeover import take_over

    ladder = {"count": 2, "base": 1, "ratio": [2, 4], "width": 8}
    settings = {
        "space": {"training.learning_rate": {"log_uniform": [1e-5, 3e-2]}, "levels": {"ladder": ladder}},
        "searcher": "random",
        "scheduler": "pbt",
        "pbt": {"rounds": 2},
        "seeds": 1,
        "budget": {"tokens": 2560, "trials": 4},
    }
    folder, result, outcomes = swept(written(tmp_path, runs_dir, texts, "pbt", **settings), runs_dir)
    assert result.completed == 4 and {each.cost["tokens"] for each in outcomes.values()} == {2560}
    runs = {run.run_id: run for run in trial_folders(runs_dir, folder.run_id).values()}
    taken = [(run, event) for run in runs.values() for event in run.happened() if event["kind"] == "taken-over"]
    assert taken
    run, event = taken[0]
    donor = runs[event["donor"]]
    at_ten = {each.run_id: next(r for r in each.records() if r["step"] == 10) for each in runs.values()}
    assert at_ten[donor.run_id]["heldout/loss"] == min(record["heldout/loss"] for record in at_ten.values())
    assert job_of(run).training.learning_rate != job_of(donor).training.learning_rate
    # What the taker went on from, evaluated, is what the donor measured.
    copy = RunFolder.create(runs_dir, "copy")
    (copy.path / "tokenizer.json").write_bytes(run.tokenizer.read_bytes())
    take_over(run, 10, copy, job_of(run))
    copy.update(status="interrupted")
    assert evaluate(copy, tokens=1024)["heldout_loss"] == at_ten[donor.run_id]["heldout/loss"]
    store = run_store(job_of(copy), copy)
    state = json.loads(store.document(store.checkpoints()[0], "state.json"))
    assert state["step"] == 10 and state["updates"]["level2"] in (2, 5)


def test_a_sweep_whose_driver_was_killed_comes_to_the_same_results(
    grid: Any, tmp_path: Path, runs_dir: Path, texts: Path
) -> None:
    file = written(tmp_path, runs_dir, texts, "killed", **GRID)
    driver = subprocess.Popen(
        [sys.executable, "-m", "nestling.jobs.app", "sweep", str(file)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"NESTLING_RUNS": str(runs_dir)},
    )
    end = time.monotonic() + 240
    while sum(len(file.read_text().splitlines()) for file in runs_dir.glob("sweeps/killed-*/trials.jsonl")) < 2:
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    (path,) = (runs_dir / "sweeps").glob("killed-*")
    folder = RunFolder.open(path)
    *before, last = Lines(folder).outcomes().values()
    assert 1 <= len(before) < 3 and folder.status() == "stopped"
    runs = {run.run_id: run for run in trial_folders(runs_dir, folder.run_id).values()}
    # The last one as if the driver had been killed between its last checkpoint and its end.
    lines = Lines(folder).path
    lines.write_text("".join(line for line in lines.open() if str(last.run_id) not in line))
    runs[str(last.run_id)].update(status="interrupted")
    finished = {str(each.run_id): runs[str(each.run_id)].log.stat().st_mtime_ns for each in before}
    result = run_sweep(open_plan(folder), folder, lambda outcome: None)
    assert result.completed == 4
    undisturbed = {
        (key[0].split("; ")[-1], key[1]): value
        for key, value in without_time(grid[2]).items()
        if value[0] == "finished"
    }
    assert without_time(Lines(folder).outcomes()) == undisturbed
    for run_id, changed_at in finished.items():
        assert runs[run_id].log.stat().st_mtime_ns == changed_at
