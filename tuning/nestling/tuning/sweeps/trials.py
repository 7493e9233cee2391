"""The trials of a sweep over Ray Tune: which there are, who decides about them, and the line that each leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from nestling.checkpoint import run_store
from nestling.tracking import RunFolder
from nestling.tracking.files import cut_half_line
from nestling.training.resume import job_of
from nestling.tuning.sweeps.outcome import Lines, Outcome, costs, measured, trial_folders
from nestling.tuning.sweeps.plan import Plan
from nestling.tuning.sweeps.schedule import member_plan, plan_of, scheduler, shares
from nestling.tuning.sweeps.trial import ERROR, STATE, Setup, run_trial


def run_trials(
    plan: Plan,
    folder: RunFolder,
    runs_dir: Path,
    parent: str,
    tell: Callable[[Outcome], None],
    at_once: int,
    resources: dict[str, float],
) -> None:
    """Run the trials that have not ended yet.

    Args:
        plan: the sweep.
        folder: the sweep's folder.
        runs_dir: where the trials' runs are made.
        parent: the sweep's run in MLflow.
        tell: called with each trial that ended.
        at_once: trials that run at the same time.
        resources: what Ray gives to the process of a trial.
    """
    # Tune's own loggers would write what the runs have in their logs, and its check wants results of failed trials.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    sweep = plan.sweep
    random.seed(sweep.draw_seed)  # Ray's Population Based Training chooses donors by it
    decided = _decided(plan, folder, runs_dir) if sweep.scheduler == "pbt" else 0.0
    setup = Setup(
        sweep=folder.path,
        runs_dir=runs_dir,
        job=plan.arms.given,
        parent=parent,
        metrics=tuple(objective.metric for objective in sweep.objectives),
        shares=shares(sweep),
        population=sweep.scheduler == "pbt",
        decided=decided,
        seconds=sweep.budget.seconds,
    )

    def trial(config: dict[str, Any]) -> None:
        run_trial(setup, config["plan"])

    searched: dict[str, Any] = {"scheduler": scheduler(sweep, plan.arms)}
    if sweep.scheduler != "pbt":  # a population must be there as a whole before it is compared
        searched["max_concurrent_trials"] = at_once
    space: dict[str, Any] | None = None
    if sweep.searcher == "optuna":
        from nestling.tuning.sweeps.search import OptunaArms

        searched |= {"search_alg": OptunaArms(sweep, plan.arms, folder.path), "num_samples": plan.trials}
    else:
        plans = _plans(plan, folder, runs_dir)
        if not plans:
            return
        space = {"plan": tune.grid_search(plans)}
    tune.Tuner(
        tune.with_resources(trial, resources),
        param_space=space,
        tune_config=tune.TuneConfig(reuse_actors=True, **searched),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.path),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=plan.arms.job.training.max_failures),
            callbacks=[Ended(plan, folder, runs_dir, tell)],
        ),
    ).fit()


def _plans(plan: Plan, folder: RunFolder, runs_dir: Path) -> list[dict[str, Any]]:
    """The trials to run, all seeds of an arm together, with what they have become in a population.

    One that has ended is only begun again where Successive Halving has to know what it came to.
    """
    sweep, ended = plan.sweep, Lines(folder).outcomes()
    seeds = [plan.arms.job.seed + place for place in range(sweep.seeds)]
    begun = trial_folders(runs_dir, folder.run_id)
    plans = []
    for number, arm in enumerate(plan.fixed or (), 1):
        for seed in seeds:
            made = plan_of(arm, seed)
            if sweep.scheduler == "pbt":
                label = f"member {number}"
                before = begun.get((label, seed))
                made = member_plan(plan.arms.arm(before.info()["point"]) if before else arm, label, seed)
            outcome = ended.get((made["label"], seed))
            if outcome is None or outcome.state == "failed" or sweep.scheduler == "asha":
                plans.append(made)
    return plans


def _decided(plan: Plan, folder: RunFolder, runs_dir: Path) -> float:
    """The share of the budget up to which a population was compared before the driver ended.

    It is that of the slowest member, unless all are there: then the decision is made again.
    """
    begun = trial_folders(runs_dir, folder.run_id).values()
    steps: list[float] = []
    for each in begun:
        found = run_store(job_of(each), each).checkpoints() if each.config.exists() else []
        last = job_of(each).training.last_step if each.config.exists() else 1
        steps.append(found[0].step / last if found else 0.0)
    if not steps or len(steps) < len(plan.fixed or ()):
        return 0.0
    passed = [share for share in shares(plan.sweep) if share <= min(steps)]
    if passed and max(steps) <= passed[-1] + 1e-3 * passed[0]:
        passed.pop()
    return passed[-1] if passed else 0.0


class Ended(tune.Callback):
    """Writes a line for each trial that ended; Ray Tune calls it in the driver."""

    def __init__(self, plan: Plan, folder: RunFolder, runs_dir: Path, tell: Callable[[Outcome], None]) -> None:
        self._metrics = [objective.metric for objective in plan.sweep.objectives]
        self._folder, self._runs_dir, self._tell = folder, runs_dir, tell
        self._lines = Lines(folder)
        cut_half_line(self._lines.path)

    def __reduce__(self) -> Any:
        """Ray Tune keeps a copy of its own, which nobody reads: a sweep is resumed without it."""
        return tune.Callback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        self._keep(trial.config["plan"], last.get(STATE, "failed"), last.get(ERROR))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        died = f"its process died {trial.num_failures} times (killed, or out of memory)"
        self._keep(trial.config["plan"], "failed", died)

    def _keep(self, plan: Mapping[str, Any], state: str, error: str | None) -> None:
        if state == "interrupted":
            return
        run = trial_folders(self._runs_dir, self._folder.run_id).get((plan["label"], plan["seed"]))
        known = (plan["parameters"], plan["flops_per_token"])
        outcome = Outcome(
            arm=plan["label"],
            values=plan["values"],
            seed=plan["seed"],
            run_id=run.run_id if run else None,
            state="stopped" if state == "running" else state,
            error=error,
            objectives=measured(run, self._metrics, *known) if run and state != "failed" else {},
            parameters=plan["parameters"],
            cost=costs(run, plan["flops_per_token"]) if run else {},
        )
        if self._lines.outcomes().get((outcome.arm, outcome.seed)) != outcome:  # else it had ended before
            self._lines.append(outcome)
            self._tell(outcome)
