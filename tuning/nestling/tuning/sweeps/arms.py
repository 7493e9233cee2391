"""Arms: the configurations of a sweep, each of them a job that can start.

A point of the space becomes the changes of a job: its own values, the width that gives it as many parameters as the
job has, and the steps that its budget buys. A point whose job would be refused, or in which a level would never move,
is no arm: searchers leave it out.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nestling.config import ConfigError, JobConfig, LevelConfig, to_mapping
from nestling.config.build import build
from nestling.config.load import changed
from nestling.data import absolute
from nestling.data.errors import DataError
from nestling.data.preparing import open_tokenizer
from nestling.models.parameters import match_parameters, parameter_count
from nestling.optim.levels import tokens_per_move
from nestling.training.nested import nested_view
from nestling.training.run import check_levels, complete
from nestling.tuning.sweeps.config import SweepConfig
from nestling.tuning.sweeps.space import Dimension, Point, Space, label

log = logging.getLogger(__name__)

#: Keys of a job that name files or folders.
PLACES = ("data.source", "data.mix", "data.tokenizer", "stream.sources", "checkpoint.dir")
#: Points that are drawn for one that can be an arm, before the space is said to hold none.
TRIES = 200


@dataclass(frozen=True)
class Arm:
    """A configuration of a sweep.

    Attributes:
        label: its name in tables and figures.
        values: what varies, as a person would name it.
        point: where in the space it is.
        changes: what its job has that is other than in the sweep's, by key; without the steps if these are measured.
        parameters: of its model.
        flops_per_token: operations of training on a token, as `nestling levels` counts them.
    """

    label: str
    values: dict[str, Any]
    point: Point
    changes: dict[str, Any]
    parameters: int
    flops_per_token: float


class Arms:
    """Makes arms of the points of a sweep's space.

    Args:
        sweep: the sweep.
        given: its job as plain mappings, the sweep's overrides in it.

    Attributes:
        job: that job.
        given: the same as mappings, in which all places are absolute, because trials run in folders of their own.
        space: the sweep's space.

    Raises:
        ConfigError: the job or the space cannot be.
    """

    def __init__(self, sweep: SweepConfig, given: Mapping[str, Any]) -> None:
        self._sweep = sweep
        self.space = Space(sweep.space)
        self.job = _with_vocabulary(build(changed(given, {})))
        self.given = _placed(given, self.job)
        self._width = next((level.width for level in self.job.levels if level.width is not None), 64)
        self._target = parameter_count(self.job.model)

    def arm(self, point: Point) -> Arm:
        """The arm at a point. Raises ConfigError if there can be none."""
        changes, config = self._job_at(point)
        check_levels(config)
        values = self.space.values(point)
        return Arm(label(values), values, point, changes, parameter_count(config.model), _flops_per_token(config))

    def _job_at(self, point: Point) -> tuple[dict[str, Any], JobConfig]:
        """What a point changes, and the job that it gives. Raises ConfigError if there can be none."""
        changes = self.space.changes(point, self._width)
        if "data.source" in changes:
            changes["data.source"] = absolute(changes["data.source"])
        config = self._built(changes)
        if self._sweep.match_parameters and (matched := self._matched(config)):
            changes |= matched
            config = self._built(changes)
        if (steps := self._steps(config)) is not None:
            changes["training.steps"] = steps
            config = self._built(changes)
            for level in config.levels:
                _need_moves(level, config.training.batch_tokens, steps)
        return changes, config

    def _built(self, changes: Mapping[str, Any]) -> JobConfig:
        return _with_vocabulary(build(changed(self.given, changes)))

    def is_job(self, arm: Arm) -> bool:
        """Whether an arm is the sweep's job as it stands, but for its steps."""
        steps = {key: value for key, value in arm.changes.items() if key == "training.steps"}
        return self._built(arm.changes) == self._built(steps)

    def check(self) -> None:
        """Raises ConfigError, naming it, if a key or value of the space is in no arm."""
        generator = random.Random(self._sweep.draw_seed)
        wrong = [
            (dimension.key, value, problem)
            for dimension in self.space.dimensions
            for value in dimension.ends()
            if (problem := self._impossible(dimension, value, generator))
        ]
        # Beside a key that cannot be at all, no value of any other one is in an arm; that key is in the problem.
        if wrong:
            key, value, problem = min(wrong, key=lambda each: each[0] not in each[2])
            raise ConfigError(f"space.{key}: with {value!r} no arm is possible: {problem}")

    def _impossible(self, dimension: Dimension, value: Any, generator: random.Random) -> str:
        """Why no arm has this value, as far as some tries say so; empty if one has."""
        first = ""
        for point in itertools.islice(self._points(generator), TRIES):
            try:
                self._job_at(point | {dimension.key: value})
                return ""
            except ConfigError as error:
                first = first or str(error)
        return first

    def _points(self, generator: random.Random) -> Iterator[Point]:
        """The grid where there is one that is no larger than the tries, else random points."""
        sizes = [len(each.choices) for each in self.space.dimensions]
        count = 1
        for size in sizes:
            count *= size
        if 0 < count <= TRIES:
            return self.space.grid()
        return (self.space.draw(generator) for _ in itertools.count())

    def grid(self) -> tuple[list[Arm], list[str]]:
        """All arms, and why each of the other points is none (twice the same job is one arm)."""
        return self._different(self.space.grid())

    def drawn(self, count: int) -> tuple[list[Arm], list[str]]:
        """Random arms, always the same ones, and why points were drawn again.

        Raises:
            ConfigError: the space does not have so many.
        """
        generator = random.Random(self._sweep.draw_seed)
        points = (self.space.draw(generator) for _ in range(count * TRIES))
        arms, refused = self._different(points, count)
        if len(arms) < count:
            raise ConfigError(
                f"budget.trials: got {count}, but the space holds only {len(arms)} different arms that are possible"
            )
        return arms, refused

    def near(self, point: Point, generator: random.Random) -> Arm:
        """An arm beside a point, or the one there."""
        for _ in range(TRIES):
            try:
                return self.arm(self.space.near(point, generator))
            except ConfigError:
                continue
        return self.arm(point)

    def _different(self, points: Iterator[Point], most: int | None = None) -> tuple[list[Arm], list[str]]:
        arms: dict[str, Arm] = {}
        refused: list[str] = []
        for point in points:
            try:
                arm = self.arm(point)
            except ConfigError as error:
                refused.append(f"{label(self.space.values(point))}: {error}")
                continue
            if arm.label in arms:
                refused.append(f"{arm.label}: is there already")
            arms.setdefault(arm.label, arm)
            if len(arms) == most:
                break
        return list(arms.values()), refused

    def _steps(self, config: JobConfig) -> int | None:
        """Steps that the budget buys; None if that has to be measured."""
        budget, cost = self._sweep.budget, float(config.training.batch_tokens)
        if budget.unit == "seconds":
            return None
        if budget.unit == "flops":
            cost *= _flops_per_token(config)
        steps = int(budget.amount / cost)
        if steps < 1:
            raise ConfigError(f"budget.{budget.unit}: got {budget.amount:g}, which is less than one step takes")
        return steps

    def _matched(self, config: JobConfig) -> dict[str, Any]:
        """The changes that give a job's model as many parameters as the sweep's job has."""
        try:
            model = match_parameters(config.model, self._target)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        made: dict[str, Any] = {}
        for each in fields(model):
            value = getattr(model, each.name)
            if value == getattr(config.model, each.name):
                continue
            if each.name == "level_widths":
                widths = iter(value)
                levels = [
                    replace(level, width=next(widths)) if level.width is not None else level for level in config.levels
                ]
                made["levels"] = [asdict(level) for level in levels]
            else:
                made[f"model.{each.name}"] = value
        return made


def _flops_per_token(config: JobConfig) -> float:
    return sum(row.component.flops_per_token for row in nested_view(config))


def _need_moves(level: LevelConfig, batch_tokens: int, steps: int) -> None:
    every = tokens_per_move({"period": level.period, "unit": level.unit}, batch_tokens)
    if every > steps * batch_tokens:
        raise ConfigError(
            f"levels: {level.name} moves every {level.period} {level.unit}, and a trial ends after {steps} steps of "
            f"{batch_tokens} tokens: it would never move; give a larger budget or shorter periods"
        )


def _placed(given: Mapping[str, Any], job: JobConfig) -> dict[str, Any]:
    whole = to_mapping(complete(job))
    places = {key: whole[key.partition(".")[0]][key.partition(".")[2]] for key in PLACES}
    return changed(given, {key: value for key, value in places.items() if value is not None})


def _with_vocabulary(config: JobConfig) -> JobConfig:
    if config.model.vocab_size is None:
        try:
            config.model.vocab_size = open_tokenizer(config.data).vocab_size
        except DataError as error:
            raise ConfigError(str(error)) from error
    return config
