"""What may change when a run is resumed, and what is refused before anything starts."""

import shutil
from dataclasses import replace

import pytest
import torch

from nestling.checkpoint import Piece, Saver, run_store
from nestling.config import ConfigError, JobConfig, RunConfig, to_yaml
from nestling.config.schema import LevelConfig
from nestling.models import HopeConfig
from nestling.tracking import RunFolder
from nestling.training.resume import resumed_job


@pytest.fixture
def job(tmp_path):
    return JobConfig(
        run=RunConfig(dir=str(tmp_path)),
        model=HopeConfig(vocab_size=257, width=8, layers=1, heads=1),
        levels=[LevelConfig(width=8, period=4)],
    )


@pytest.fixture
def folder(tmp_path, job):
    """An interrupted run with a checkpoint of step 40 of 1000."""
    folder = RunFolder.create(tmp_path, "half")
    folder.config.write_text(to_yaml(job))
    save(job, folder)
    folder.update(status="interrupted", steps=40)
    return folder


def save(job, folder):
    saver = Saver(run_store(job, folder), 0, 1, 1, 0, lambda *_: None, lambda *_: None)
    saver.write(40, "token", [Piece("weight/a", 0, torch.zeros(2))], {})
    saver.commit()
    assert saver.wait()


def test_what_may_change(folder, job):
    changes = ["training.workers=2", "training.zero_stage=3", "training.learning_rate=0.1", "training.steps=40"]
    config = resumed_job(folder, [*changes, "levels.0.period=8", "levels.0.learning_rate=0.5", "evaluation.tokens=9"])
    assert (config.training.workers, config.training.zero_stage, config.training.steps) == (2, 3, 40)
    assert (config.levels[0].period, config.levels[0].learning_rate) == (8, 0.5)
    assert resumed_job(folder) == job
    moving = resumed_job(folder, ["continuum.drive=meta", "continuum.periods=[4]", "continuum.rates=[0.1]"])
    assert moving.continuum.drive == "meta" and moving.model == job.model


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.width=16",
        "model.chunk_size=8",
        "levels.0.width=16",
        "levels.0.optimizer=sgd",
        "levels=[{width: 8, period: 4}, {width: 8}]",
        "data.sequence_length=128",
        "data.tokenizer=other.json",
        "training.batch_tokens=8192",
        "run.name=other",
    ],
)
def test_what_decides_about_state_and_position_may_not(folder, override):
    with pytest.raises(ConfigError, match=r"in the middle of it; start a new run for that. A resumed run may change"):
        resumed_job(folder, [override])


def test_fewer_steps_than_were_taken_are_refused(folder):
    with pytest.raises(ConfigError, match=r"training.steps: got 39, but run \w+ has taken 40 steps"):
        resumed_job(folder, ["training.steps=39"])


def test_a_finished_run_needs_more_steps(folder):
    folder.update(status="finished", steps=1000)
    with pytest.raises(ConfigError, match=r"has finished its 1000 steps; .* nestling resume \w+ training.steps=2000"):
        resumed_job(folder)
    assert resumed_job(folder, ["training.steps=1001"]).training.steps == 1001


def test_a_run_that_never_began_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="ended before its training began"):
        resumed_job(RunFolder.create(tmp_path, "empty"))


def test_a_moved_runs_folder_is_found_where_it_is(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(folder.path, moved)
    config = resumed_job(RunFolder.open(moved / folder.path.name))
    assert config.run.dir == str(moved)


def test_another_place_for_checkpoints_must_hold_them(folder, job, tmp_path):
    with pytest.raises(ConfigError, match=f"there is no checkpoint .*; move its folder {folder.path.name} there first"):
        resumed_job(folder, [f"checkpoint.dir={tmp_path}/far"])
    there = replace(job, checkpoint=replace(job.checkpoint, dir=f"{tmp_path}/far"))
    save(there, folder)
    assert resumed_job(folder, [f"checkpoint.dir={tmp_path}/far"]).checkpoint.dir == f"{tmp_path}/far"
