"""How long a step of a job takes here, for budgets in seconds: some steps of it are taken, and forgotten."""

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

#: Steps before the clock starts; of the steps that are timed, the least number, and the share of the budget they take.
WARMUP, TIMED, SHARE = 3, 10, 0.1
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
            known[label] = max(1, int(seconds / _seconds_a_step(config, SHARE * seconds)))
            replace_json(file, known)
    return int(known[label])


def _seconds_a_step(config: JobConfig, least: float) -> float:
    """The mean over steps that take at least so many seconds together."""
    form_group()
    torch.set_num_threads(1)
    gpu = config.training.device != "cpu" and torch.cuda.is_available()
    corpus = prepare(config.data, Path(config.run.dir) / "cache")
    training = Training(complete(config), corpus, torch.device("cuda" if gpu else "cpu"), 0, 1)
    for _ in range(WARMUP):
        training.step()
    taken, began = 0, time.perf_counter()
    while taken < TIMED or time.perf_counter() - began < least:
        training.step()
        taken += 1
    return (time.perf_counter() - began) / taken
