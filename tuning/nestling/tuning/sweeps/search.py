"""Optuna as a searcher of Ray Tune: a configuration is asked for once, and told by the mean over its seeds.

The study is a sqlite file in the sweep's folder, so that it outlives the driver. Points that can be no arm are told as
failed, and another one is asked for.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from nestling.config import ConfigError
from nestling.tuning.sweeps.arms import TRIES, Arms
from nestling.tuning.sweeps.config import SweepConfig
from nestling.tuning.sweeps.schedule import plan_of
from nestling.tuning.sweeps.space import Dimension, Point
from nestling.tuning.sweeps.trial import STATE

optuna.logging.set_verbosity(optuna.logging.WARNING)


class OptunaArms(Searcher):
    """Asks Optuna for arms, and tells it what became of them.

    Args:
        sweep: the sweep.
        arms: makes arms of points.
        folder: where the study is, or is made.
    """

    def __init__(self, sweep: SweepConfig, arms: Arms, folder: Path) -> None:
        super().__init__()
        self._sweep, self._arms = sweep, arms
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder / 'optuna.db'}",
            study_name=sweep.name,
            directions=["minimize" if each.mode == "min" else "maximize" for each in sweep.objectives],
            load_if_exists=True,
        )
        self._asked: dict[str, int] = {}  # the number of each arm's trial of Optuna's
        self._results: dict[str, dict[int, dict[str, Any]]] = {}
        self._plans: deque[dict[str, Any]] = deque()
        self._of_trial: dict[str, dict[str, Any]] = {}
        # What was asked for in an earlier driver is begun again, and ends at once where it has finished.
        for each in self._study.get_trials(deepcopy=False):
            if len(each.params) == len(arms.space.dimensions):
                done = each.state in (TrialState.COMPLETE, TrialState.PRUNED)
                self._begin(_point(arms, each.params), each.number, told=done)
            else:  # the driver was killed while it asked
                self._fail(each.number)

    def __reduce__(self) -> Any:
        """Ray Tune keeps a copy of its own, which nobody reads: the study is on disk."""
        return Searcher, ()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if not self._plans and len(self._results) < (self._sweep.budget.trials or 0):
            self._ask()
        if not self._plans:
            return Searcher.FINISHED
        self._of_trial[trial_id] = self._plans.popleft()
        return {"plan": self._of_trial[trial_id]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        plan = self._of_trial.pop(trial_id)
        results = self._results[plan["label"]]
        results[plan["seed"]] = result or {}
        if len(results) == self._sweep.seeds and plan["label"] in self._asked:
            self._tell(self._asked.pop(plan["label"]), list(results.values()))

    def save(self, checkpoint_path: str) -> None:
        """The study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """As above."""

    def _ask(self) -> None:
        for _ in range(TRIES):
            # A seed for each trial: a driver that goes on for one that was killed draws what that one would have drawn.
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = optuna.samplers.TPESampler(seed=self._sweep.draw_seed + number)
            trial = self._study.ask()
            if self._begin({each.key: _suggested(trial, each) for each in self._arms.space.dimensions}, trial.number):
                return

    def _begin(self, point: Point, number: int, told: bool = False) -> bool:
        """Plan the trials of the arm at a point; false if there can be none, or if it is there already."""
        try:
            arm = self._arms.arm(point)
        except ConfigError:
            arm = None
        if arm is None or arm.label in self._results:
            self._fail(number)
            return False
        self._results[arm.label] = {}
        if not told:
            self._asked[arm.label] = number
        seed = self._arms.job.seed
        self._plans += [plan_of(arm, seed + place) for place in range(self._sweep.seeds)]
        return True

    def _tell(self, number: int, results: list[dict[str, Any]]) -> None:
        metrics = [objective.metric for objective in self._sweep.objectives]
        values = [statistics.fmean(each.get(metric, math.nan) for each in results) for metric in metrics]
        if any(each.get(STATE) == "interrupted" for each in results):
            return  # it goes on when the sweep is resumed
        if not all(map(math.isfinite, values)):
            self._fail(number)
        elif all(each.get(STATE) == "finished" for each in results):
            self._study.tell(number, values, skip_if_finished=True)
        else:  # stopped early: worse than others, and not to be compared with those that have had all of their budget
            self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def _fail(self, number: int) -> None:
        """Tell Optuna that nothing came of a trial, if it does not know that from an earlier driver."""
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _suggested(trial: optuna.Trial, dimension: Dimension) -> Any:
    if dimension.choices:
        texts = [json.dumps(choice) for choice in dimension.choices]
        return dimension.choices[texts.index(trial.suggest_categorical(dimension.key, texts))]
    if dimension.whole:
        return trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high))
    return dimension.tidy(trial.suggest_float(dimension.key, dimension.low, dimension.high, log=dimension.log))


def _point(arms: Arms, params: dict[str, Any]) -> Point:
    """The point of a trial of Optuna's."""
    found = {}
    for each in arms.space.dimensions:
        value = params[each.key]
        if each.choices:
            value = next(choice for choice in each.choices if json.dumps(choice) == value)
        found[each.key] = value if each.choices or each.whole else each.tidy(value)
    return found
