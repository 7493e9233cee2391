"""How long a step of a job takes here, for budgets in seconds: a few steps of it are taken, and forgotten."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from nestling.config import JobConfig
from nestling.data import prepare
from nestling.tracking.files import locked, read_json, replace_json
from nestling.training.alone import form_group
from nestling.training.loop import Training
from nestling.training.run import complete

#: Steps before the clock starts, and steps that are timed.
WARMUP, TIMED = 3, 10
#: Seconds in which another trial of the same sweep has measured.
PATIENCE = 600.0


def affordable_steps(label: str, config: JobConfig, seconds: float, file: Path) -> int:
    """Steps that a job takes in some seconds; what the first trial of an arm has measured holds for all of them.

    Args:
        label: the arm.
        config: its job, of one worker.
        seconds: of training.
        file: where the steps of all arms are kept.
    """
    with locked(file.with_suffix(".lock"), PATIENCE):
        known = read_json(file)
        if label not in known:
            known[label] = max(1, int(seconds / _seconds_a_step(config)))
            replace_json(file, known)
    return int(known[label])


def _seconds_a_step(config: JobConfig) -> float:
    form_group()
    torch.set_num_threads(1)
    gpu = config.training.device != "cpu" and torch.cuda.is_available()
    corpus = prepare(config.data, Path(config.run.dir) / "cache")
    training = Training(complete(config), corpus, torch.device("cuda" if gpu else "cpu"), 0, 1)
    for _ in range(WARMUP):
        training.step()
    began = time.perf_counter()
    for _ in range(TIMED):
        training.step()
    return (time.perf_counter() - began) / TIMED
