"""Runs an experiment's trials side by side: Ray tasks of one CPU and one thread each, on this machine or a cluster.

A trial that fails is told and left out; the others go on. Of an arm with several candidates the first seed of each is
run, and the best by validation gets the other seeds, as soon as it is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.tuning.reproductions.experiment import Arm, Experiment, Outcome, Trial, Work


@dataclass(frozen=True)
class Failure:
    """A trial that raised an error, or whose process died."""

    task: str
    model: str
    candidate: str
    seed: int
    error: str


@dataclass(frozen=True)
class Progress:
    """What has just ended, and how many of how many trials have."""

    ended: Trial | Failure
    done: int
    total: int


def run_trials(experiment: Experiment, seeds: int, tell: Callable[[Progress], None]) -> list[Trial | Failure]:
    """Run every arm with seeds 0 to `seeds - 1`; Ray must be running.

    Args:
        experiment: what to run.
        seeds: trials of each arm, of its best candidate.
        tell: called in this process with each trial that ended, in the order of their ends.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=0)(_trial)
    total = sum(len(arm.candidates) + seeds - 1 for arm in experiment.arms)
    waiting: dict[Any, tuple[Arm, str, int]] = {}
    ended: list[Trial | Failure] = []

    def submit(arm: Arm, candidate: str, seed: int) -> None:
        waiting[task.remote(arm.candidates[candidate], seed)] = (arm, candidate, seed)

    for arm in experiment.arms:
        for candidate in arm.candidates:
            for seed in range(seeds if len(arm.candidates) == 1 else 1):
                submit(arm, candidate, seed)
    while waiting:
        (reference,), _ = ray.wait(list(waiting))
        arm, candidate, seed = waiting.pop(reference)
        ended.append(_result(reference, arm, candidate, seed))
        if len(arm.candidates) > 1 and seed == 0 and not any(other is arm for other, _, _ in waiting.values()):
            if (chosen := best_candidate(arm, ended)) is None:
                total -= seeds - 1
            else:
                for later in range(1, seeds):
                    submit(arm, chosen, later)
        tell(Progress(ended[-1], len(ended), total))
    return ended


def best_candidate(arm: Arm, ended: Sequence[Trial | Failure]) -> str | None:
    """The candidate whose first seed has the best validation; None if every one failed or diverged."""
    if len(arm.candidates) == 1:
        return next(iter(arm.candidates))
    firsts = {trial.candidate: trial.outcome.validation for trial in of_arm(arm, ended) if trial.seed == 0}
    known = {candidate: value for candidate, value in firsts.items() if value is not None}
    return max(known, key=known.__getitem__, default=None)


def of_arm(arm: Arm, ended: Sequence[Trial | Failure]) -> Iterator[Trial]:
    """The arm's trials that did not fail."""
    for trial in ended:
        if isinstance(trial, Trial) and (trial.task, trial.model) == (arm.task, arm.model):
            yield trial


def chosen(arm: Arm, ended: Sequence[Trial | Failure]) -> list[Trial]:
    """The trials of the arm's best candidate that did not fail, by seed."""
    best = best_candidate(arm, ended)
    return sorted((trial for trial in of_arm(arm, ended) if trial.candidate == best), key=lambda trial: trial.seed)


def _trial(work: Work, seed: int) -> tuple[Outcome, float]:
    """What a Ray worker does."""
    import torch

    torch.set_num_threads(1)  # more threads than cores were up to 19 times slower
    torch.set_flush_denormal(True)  # a memory that decays to zero gets there five times faster
    began = time.process_time()
    outcome = work(seed)
    return outcome, time.process_time() - began


def _result(reference: Any, arm: Arm, candidate: str, seed: int) -> Trial | Failure:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        outcome, seconds = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        return Failure(arm.task, arm.model, candidate, seed, f"{type(cause).__name__}: {cause}")
    except RayError as error:  # its process died
        return Failure(arm.task, arm.model, candidate, seed, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return Trial(arm.task, arm.model, candidate, seed, seconds, outcome)
