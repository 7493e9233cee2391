"""The driver of a sweep: its arms, its trials over Ray Tune, the lines that they leave, MLflow, and the answer.

A sweep that is resumed is begun again: arms are drawn as before, trials that have finished are left out or give their
results at once, all others go on from their checkpoints. So nothing that Ray Tune keeps decides what is in a sweep.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nestling.cluster import connected
from nestling.config.load import is_streamed
from nestling.data import prepare
from nestling.tracking import RunFolder, TrackedRun, finish, start
from nestling.tracking.client import connect, reason
from nestling.training.attended import attended
from nestling.tuning.sweeps.outcome import Lines, Outcome, trial_folders
from nestling.tuning.sweeps.plan import Plan
from nestling.tuning.sweeps.report import Found, report

log = logging.getLogger(__name__)

#: Seconds that the processes of an earlier driver have to end.
PATIENCE = 60.0


@dataclass(frozen=True)
class Result:
    """How a sweep ended."""

    parent_run_id: str
    trials: int
    completed: int
    failed: list[Outcome]
    found: Found


def run_sweep(plan: Plan, folder: RunFolder, tell: Callable[[Outcome], None]) -> Result:
    """Run the trials of a sweep that have not ended yet, and say what came of all.

    The first Ctrl-C or SIGTERM saves every trial that runs, the second ends at once.

    Args:
        plan: what is run.
        folder: where; see `make_folder`.
        tell: called with each trial that ended.

    Raises:
        RunBusyError: another process runs it.
        TrackingError, ClusterError, DataError: what cannot be reached or found.
        KeyboardInterrupt: passed on when everything is saved.
    """
    runs_dir = folder.path.parent.parent
    with folder.claim():
        folder.stop.unlink(missing_ok=True)
        folder.update(status="running", finished=None, trials=plan.trials)
        status, tracked = "failed", None
        try:
            _wait_for_the_last(folder, runs_dir)
            tracked = _start(plan, folder, runs_dir)
            _run(plan, folder, runs_dir, tracked, tell)
            found = report(folder, runs_dir)
            _record(tracked, found)
            outcomes = Lines(folder).outcomes().values()
            failed = [each for each in outcomes if each.state == "failed"]
            status = "failed" if len(failed) == len(outcomes) else "finished"
            folder.update(best=found.best, answer=found.answer)
            return Result(tracked.mlflow_run_id, plan.trials, len(outcomes) - len(failed), failed, found)
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            folder.update(status=status)
            if tracked is not None:
                finish(tracked, folder, status)


def _wait_for_the_last(folder: RunFolder, runs_dir: Path) -> None:
    """Trials of a driver that was killed may live on for some seconds, and nobody else can train their runs."""
    end = time.monotonic() + PATIENCE
    for run in trial_folders(runs_dir, folder.run_id).values():
        while run.claimed and time.monotonic() < end:
            time.sleep(0.5)


def _start(plan: Plan, folder: RunFolder, runs_dir: Path) -> TrackedRun:
    """The parent run in MLflow."""
    tracking = plan.arms.job.tracking
    settings = asdict(plan.sweep) | {"command": plan.command}
    return start(settings, folder, tracking.uri, tracking.experiment, runs_dir=runs_dir)


def _run(plan: Plan, folder: RunFolder, runs_dir: Path, tracked: TrackedRun, tell: Callable[[Outcome], None]) -> None:
    import ray

    from nestling.tuning.sweeps.trials import run_trials

    workers = max([plan.arms.job.training.workers, *_choices(plan, "training.workers")])
    cpus = workers + (workers > 1)  # beside the workers of a trial, there is its own process
    at_once = max(1, (os.cpu_count() or 1) // workers)
    ours = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        stack.enter_context(connected(at_once * cpus if ours else cpus))
        there = ray.cluster_resources()
        device, gpus = plan.arms.job.training.device, int(there.get("GPU", 0))
        on_gpu = device == "cuda" or (device == "auto" and gpus >= workers)
        if not ours:
            at_once = max(1, int(there["CPU"] - 1) // cpus)  # one is left for the tasks that read data
        if on_gpu:
            at_once = max(1, min(at_once, gpus // workers))
        if not is_streamed(plan.arms.job):
            prepare(plan.arms.job.data, runs_dir / "cache")  # before there are trials that would all do it
        resources = {"CPU": 1.0, "GPU": float(on_gpu and workers == 1)}
        work = partial(run_trials, plan, folder, runs_dir, tracked.mlflow_run_id, tell, at_once, resources)
        attended(work, folder)
    if folder.stop.exists():
        raise KeyboardInterrupt


def _choices(plan: Plan, key: str) -> list[Any]:
    return [value for each in plan.arms.space.dimensions if each.key == key for value in each.ends()]


def _record(tracked: TrackedRun, found: Found) -> None:
    """The page and the figures as artifacts of the parent; MLflow away now spoils nothing."""
    try:
        client = connect(tracked.uri)
        for file in filter(None, (found.page, *found.figures.values())):
            client.log_artifact(tracked.mlflow_run_id, str(file))
    except Exception as error:  # MLflow raises its own errors, SQLAlchemy's, urllib's and plain ones
        log.warning("MLflow did not take the figures (%s); the page is %s", reason(error), found.page)
