"""Who decides between the parts of trials: nobody, Successive Halving, or Population Based Training.

Trials report at shares of their budget that are the same for all, so both schedulers compare what is comparable, and
their clock is that share in units of the first one.
"""

from __future__ import annotations

import random
from fnmatch import fnmatchcase
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from nestling.config import ConfigError
from nestling.training.resume import CHANGEABLE, FIXED
from nestling.tuning.sweeps.arms import Arm, Arms
from nestling.tuning.sweeps.config import SweepConfig
from nestling.tuning.sweeps.space import LADDER
from nestling.tuning.sweeps.trial import PASSED, SHARE


def shares(sweep: SweepConfig) -> tuple[float, ...]:
    """Shares of a trial's steps after which the scheduler is asked, beside the end."""
    if sweep.scheduler == "asha":
        return tuple(sweep.asha.factor**-number for number in range(sweep.asha.rungs, 0, -1))
    if sweep.scheduler == "pbt":
        return tuple(number / sweep.pbt.rounds for number in range(1, sweep.pbt.rounds))
    return ()


def scheduler(sweep: SweepConfig, arms: Arms) -> TrialScheduler:
    """Ray Tune's scheduler for a sweep."""
    objective = sweep.objectives[0]
    first = next(iter(shares(sweep)), 1.0)
    if sweep.scheduler == "asha":
        # Ray's annotations ask for whole numbers, its arithmetic does not. The first rung is a little earlier than its
        # share, which is a rounded number; nothing is decided about a trial that is at its end.
        clock: dict[str, Any] = {"time_attr": SHARE, "grace_period": 0.999 * first, "max_t": 1 + first / 2}
        factor = sweep.asha.factor
        return Halving(metric=objective.metric, mode=objective.mode, reduction_factor=factor, **clock)
    if sweep.scheduler == "pbt":
        return Population(sweep, arms)
    return FIFOScheduler()


class Halving(AsyncHyperBandScheduler):
    """Successive Halving that, in a sweep that is resumed, stands by what it has allowed before."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(PASSED) else decision


class Population(PopulationBasedTraining):
    """Population Based Training in step: all members are compared at the same share of their budget."""

    def __init__(self, sweep: SweepConfig, arms: Arms) -> None:
        objective = sweep.objectives[0]
        super().__init__(
            time_attr=SHARE,
            metric=objective.metric,
            mode=objective.mode,
            perturbation_interval=0.999 / sweep.pbt.rounds,  # as above
            quantile_fraction=sweep.pbt.share,
            custom_explore_fn=dict,  # `_get_new_config` does it, who alone knows both trials
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        self._arms, self._generator = arms, random.Random(sweep.draw_seed)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The donor's settings, changed a little, for the member that `trial` stays."""
        member = trial.config["plan"]
        arm = self._arms.near(trial_to_clone.config["plan"]["point"], self._generator)
        return {"plan": member_plan(arm, member["label"], member["seed"])}, {}


def plan_of(arm: Arm, seed: int) -> dict[str, Any]:
    """What Ray Tune hands to a trial."""
    return {
        "label": arm.label,
        "values": arm.values,
        "point": arm.point,
        "changes": arm.changes,
        "parameters": arm.parameters,
        "flops_per_token": arm.flops_per_token,
        "seed": seed,
    }


def member_plan(arm: Arm, label: str, seed: int) -> dict[str, Any]:
    """The same for a member of a population, whose settings change and whose name does not."""
    return plan_of(arm, seed) | {"label": label}


def check_population(sweep: SweepConfig, arms: Arms) -> None:
    """Raises ConfigError if something varies that cannot change in the middle of a run, or trials have many workers."""
    if arms.job.training.workers > 1:
        raise ConfigError(
            f"training.workers: got {arms.job.training.workers}; with scheduler=pbt all members are there at once and "
            "would wait for each other's workers: needs training.workers=1"
        )
    for dimension in arms.space.dimensions:
        if not dimension.varies:
            continue
        name = dimension.key.removeprefix(LADDER)
        if dimension.key.startswith(LADDER):
            same = name != "periods" or len({len(periods) for periods in dimension.choices}) == 1
            possible = name in ("base", "ratio", "periods", "learning_rate") and same
        else:
            possible = any(fnmatchcase(dimension.key, pattern) for pattern in CHANGEABLE)
            possible &= dimension.key not in (*FIXED, "training.steps")
        if not possible:
            raise ConfigError(
                f"space.{dimension.key}: cannot change in the middle of a run, and with scheduler=pbt it would; a "
                "population can vary learning rates, the periods of a fixed number of levels, and other keys that "
                "nestling resume may change"
            )
