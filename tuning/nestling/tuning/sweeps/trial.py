"""One trial, in a process of Ray Tune: an ordinary run of the platform, in parts between which the scheduler decides.

A trial takes up what there is of its run: it can be begun again at any time. With one worker it trains in this process,
which the next trial finds with torch, DeepSpeed and MLflow imported; more workers are those of a TorchTrainer. A part
ends at a step with an evaluation and a checkpoint, so that what the scheduler compares and copies is exact, however
long it takes to decide.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestling.config import JobConfig
from nestling.config.build import build
from nestling.config.load import changed, is_streamed
from nestling.tracking import RunFolder
from nestling.tuning.sweeps.outcome import Lines, costs, measured, trial_folders

#: Keys of what a trial reports to Ray Tune; PASSED: it has been allowed to go on from this share before.
SHARE, PASSED, STATE, ERROR = "share", "passed", "state", "error"
_POINTER = "run.json"
_WATCH = 0.5  # seconds between two looks at whether the sweep is to stop


@dataclass(frozen=True)
class Setup:
    """What all trials of a sweep share.

    Attributes:
        sweep: the sweep's folder.
        runs_dir: where the trials' runs are made.
        job: the sweep's job as plain mappings.
        parent: the sweep's run in MLflow.
        metrics: what is compared.
        shares: shares of the steps after which the scheduler is asked, beside the end.
        population: whether a trial may go on from another one's checkpoint.
        decided: shares up to which it has decided before.
        seconds: training time of a trial, if that is what the budget is.
    """

    sweep: Path
    runs_dir: Path
    job: Mapping[str, Any]
    parent: str
    metrics: tuple[str, ...]
    shares: tuple[float, ...] = ()
    population: bool = False
    decided: float = 0.0
    seconds: float | None = None


def run_trial(setup: Setup, plan: Mapping[str, Any]) -> None:
    """Train a trial to its end, or until the scheduler or a person stops it; what it came to is in its run's folder.

    Args:
        plan: the `Arm` as a mapping, and `seed`.
    """
    from ray import tune

    sweep = RunFolder.open(setup.sweep)
    if sweep.stop.exists():
        tune.report({STATE: "interrupted"})
        return
    folder = _folder(setup, sweep, plan)
    try:
        plan = _bounded(setup, sweep, plan, folder)
        with _stopping(sweep, folder):
            _train(setup, plan, folder)
    except KeyboardInterrupt:
        tune.report({STATE: "interrupted"})
    except Exception as error:  # whatever is wrong with this configuration must not end the others
        with folder.ray_log.open("a") as file:
            traceback.print_exception(error, file=file)
        folder.update(status="failed", error=_line(error))
        tune.report({STATE: "failed", ERROR: _line(error)})


def job_of_trial(setup: Setup, plan: Mapping[str, Any]) -> JobConfig:
    """The job of a trial: the sweep's, with the changes of the arm, its seed and its place."""
    config = build(changed(setup.job, {**plan["changes"], "seed": plan["seed"]}))
    name = RunFolder.open(setup.sweep).name
    return replace(config, run=replace(config.run, name=name, dir=str(setup.runs_dir)))


def _bounded(setup: Setup, sweep: RunFolder, plan: Mapping[str, Any], folder: RunFolder) -> Mapping[str, Any]:
    """The plan with its steps, which a budget in seconds leaves open."""
    if setup.seconds is None:
        return plan
    from nestling.tuning.sweeps.speed import affordable_steps

    config = job_of_trial(setup, plan)
    steps = affordable_steps(plan["label"], config, setup.seconds, sweep.path / "steps.json")
    changes = {**plan["changes"], "training.steps": steps}
    folder.update(changes=changes)
    return {**plan, "changes": changes}


def _train(setup: Setup, plan: Mapping[str, Any], folder: RunFolder) -> None:
    from ray import tune

    config = job_of_trial(setup, plan)
    decided = max(setup.decided, _take_up(config, folder) if setup.population else 0.0)
    before = Lines(RunFolder.open(setup.sweep)).outcomes().get((plan["label"], plan["seed"]))
    for share in (*setup.shares, 1.0):
        stop = math.ceil(share * config.training.last_step) if share < 1.0 else math.inf
        reached = _reached(config, folder)
        if reached < stop:
            if before is not None and before.state == "stopped":
                return  # the scheduler has decided so, and knows again all that the trial came to
            _fit(config, folder, stop)
        ended = folder.status() == "finished"
        cost = costs(folder, plan["flops_per_token"], stop)
        known = (plan["parameters"], plan["flops_per_token"])
        report: dict[str, Any] = measured(folder, list(setup.metrics), *known, stop)
        report |= {STATE: "finished" if ended else "running", "tokens": cost["tokens"]}
        if share == 1.0:
            if folder.info().get("cost") != cost:  # else it had ended before
                _record(folder, cost, report)
                folder.update(cost=cost)
            tune.report(report)
            return
        if share <= decided:
            continue
        report |= {SHARE: share, PASSED: reached > stop}
        if setup.population:
            _report_with_pointer(config, folder, report)
        else:
            tune.report(report)


def _fit(config: JobConfig, folder: RunFolder, stop: float) -> None:
    """Train up to a step, or to the end if it is infinite. Raises KeyboardInterrupt if it did not get there."""
    from nestling.training import Part, fit
    from nestling.training.stream import learn_stream

    part = Part(until=stop, in_process=config.training.workers == 1)
    try:
        (learn_stream if is_streamed(config) else fit)(config, folder, part=part)
    except KeyboardInterrupt:
        if _reached(config, folder) < stop:
            raise


def _reached(config: JobConfig, folder: RunFolder) -> float:
    """The step from which the run would go on; infinite if it has finished."""
    from nestling.checkpoint import run_store

    if folder.status() == "finished":
        return math.inf
    return next((checkpoint.step for checkpoint in run_store(config, folder).checkpoints()), 0)


def _folder(setup: Setup, sweep: RunFolder, plan: Mapping[str, Any]) -> RunFolder:
    """The trial's run, made if it has none yet; what it is about is brought up to date."""
    arm, seed = plan["label"], plan["seed"]
    folder = trial_folders(setup.runs_dir, sweep.run_id).get((arm, seed))
    folder = folder or RunFolder.create(setup.runs_dir, sweep.name)
    tags = {
        "mlflow.parentRunId": setup.parent,
        "nestling.sweep": sweep.run_id,
        "nestling.arm": arm,
        "nestling.seed": str(seed),
    }
    varied = {key: str(value) for key, value in plan["values"].items()}
    folder.update(
        sweep=sweep.run_id,
        arm=arm,
        seed=seed,
        values=plan["values"],
        point=plan["point"],
        changes=plan["changes"],
        tracked={"tags": tags, "parameters": varied},
        **({"kind": "stream"} if is_streamed(build(changed(setup.job, plan["changes"]))) else {}),
    )
    return folder


@contextmanager
def _stopping(sweep: RunFolder, folder: RunFolder) -> Iterator[None]:
    """While the block runs, a sweep that is to stop stops the run, too."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_WATCH):
            if sweep.stop.exists():
                folder.stop.touch()

    thread = threading.Thread(target=watch, name="nestling-stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take_up(config: JobConfig, folder: RunFolder) -> float:
    """Take up what the scheduler has decided: maybe to go on from another trial's checkpoint, in the place of its own.

    Returns:
        The share after which that was decided; 0 before the first time.
    """
    from ray import tune

    from nestling.training.takeover import take_over

    pointer = tune.get_checkpoint()
    if pointer is None:
        return 0.0
    with pointer.as_directory() as place:
        content = json.loads(Path(place, _POINTER).read_text())
    origin = [content["run"], content["step"]]
    donor = RunFolder.open(content["run"])
    if donor.path != folder.path and folder.info().get("origin") != origin:
        take_over(donor, content["step"], folder, config)
        folder.update(origin=origin)
    return float(content[SHARE])


def _report_with_pointer(config: JobConfig, folder: RunFolder, report: dict[str, Any]) -> None:
    """Report, with the place of the newest checkpoint as Ray Tune's checkpoint; it stays until two later reports."""
    from ray import tune

    from nestling.checkpoint import run_store

    store = run_store(config, folder)
    newest = store.checkpoints()[0]
    store.pin(newest)
    for checkpoint in store.checkpoints():
        if checkpoint.step in sorted(store.pinned())[:-2]:
            store.unpin(checkpoint)
    with tempfile.TemporaryDirectory() as place:
        Path(place, _POINTER).write_text(
            json.dumps({"run": str(folder.path), "step": newest.step, SHARE: report[SHARE]})
        )
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(place))


def _record(folder: RunFolder, cost: Mapping[str, float], report: Mapping[str, Any]) -> None:
    """Cost and objectives as metrics of the trial's MLflow run; MLflow away now spoils nothing."""
    from mlflow.entities import Metric

    from nestling.tracking.client import connect, present_uri

    info = folder.info()
    now, step = int(1000 * _now()), int(info.get("steps") or 0)
    values = {f"cost/{key}": value for key, value in cost.items()}
    values |= {f"objective/{key}": value for key, value in report.items() if key not in (STATE, "tokens")}
    try:
        client = connect(present_uri(info["tracking_uri"], folder.path.parent))
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        client.log_batch(info["mlflow_run_id"], metrics=metrics)
    except Exception as error:  # MLflow raises its own errors, SQLAlchemy's, urllib's and plain ones
        folder.event("tracking", f"MLflow did not take the cost of the trial: {_line(error)}", **cost)


def _now() -> float:
    import time

    return time.time()


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
