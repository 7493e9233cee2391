"""A stable rule under a fast context: two levels of the project's own optimizer against one learning rate.

The published toy of two time scales, its printed numbers and what survives a fair comparison: y = 2x + 5 sin(t/4), the
slope learned slowly, the bias fast. The numbers beside ours are the two lines that the published script prints; there
is no model and no language here, only `nestling.optim.Levels` on two scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nestling.optim import Levels
from nestling.tasks import stable_rule
from nestling.tuning.reproductions.experiment import Arm, Experiment, Outcome, Trial

#: Learning rates of the one-level learners; the published one is 0.05.
GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8)
SLOPE, BIAS, TOTAL, MEAN, LAST, SLOPE_LAST = (
    *("final slope", "final bias", "sum of absolute errors", "mean absolute error"),
    *("mean absolute error, last 100", "mean slope error, last 100"),
)
METRICS = (SLOPE, BIAS, TOTAL, MEAN, LAST, SLOPE_LAST)
#: What the seed of the data is when the person's seed is 0: that of the published script.
PUBLISHED_SEED = 42
TASK = "stable rule, fast context"


@dataclass(frozen=True)
class TwoTimescales:
    """An online linear learner w x + b, one step a point: a `Work`.

    Attributes:
        slow: learning rate of w.
        fast: learning rate of b.
        retention: what b is multiplied by after each of its steps, its forgetting gate; 1 forgets nothing.
    """

    slow: float
    fast: float
    retention: float = 1.0

    def __call__(self, seed: int) -> Outcome:
        x, wave, y = data(PUBLISHED_SEED + seed)
        weight, bias = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = Levels(
            [
                {"params": [bias], "name": "level 1", "lr": self.fast, "period": 1},
                {"params": [weight], "name": "level 2", "lr": self.slow, "period": 1},
            ],
            optimizer="sgd",
        )
        errors, slopes, biases = [], [], []
        for point, wanted in zip(x, y, strict=True):
            error = wanted - (weight * point + bias)
            optimizer.zero_grad()
            (0.5 * error**2).backward()
            optimizer.step()
            with torch.no_grad():
                bias.mul_(self.retention)
            errors.append(abs(error.item()))
            slopes.append(weight.item())
            biases.append(bias.item())
        return Outcome(
            metrics=dict(zip(METRICS, figures(errors, slopes, biases[-1]), strict=True)),
            tokens=len(errors),
            parameters=2,
            details={"slopes": slopes, "biases": biases, "wave": wave.tolist()},
        )


@dataclass(frozen=True)
class NoiseFloor:
    """One who knows slope and wave and is off by the noise alone: a `Work`."""

    def __call__(self, seed: int) -> Outcome:
        x, wave, y = data(PUBLISHED_SEED + seed)
        errors = (y - 2 * x - wave).abs().tolist()
        metrics = dict(zip(METRICS, figures(errors, [2.0] * len(errors), float("nan")), strict=True))
        return Outcome({key: value for key, value in metrics.items() if key != BIAS}, tokens=len(errors))


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the wave and y, (300,) each; numpy's generator, because the published numbers are of its seed 42."""
    numbers = np.random.RandomState(seed)
    x, noise = (torch.from_numpy(numbers.randn(300)) for _ in range(2))
    return x, *stable_rule(x, noise)


def figures(errors: Sequence[float], slopes: Sequence[float], bias: float) -> tuple[float, ...]:
    """The values of `METRICS`."""
    return (
        slopes[-1],
        bias,
        sum(errors),
        sum(errors) / len(errors),
        sum(errors[-100:]) / 100,
        sum(abs(slope - 2) for slope in slopes[-100:]) / 100,
    )


PUBLISHED_ONE = "one level, rate 0.05 (as published)"
PUBLISHED_TWO = "two levels, 0.05 / 0.8, retention 0.5 (as published)"
#: Learners by the name that the table gives them, by rate.
LEARNERS = {
    PUBLISHED_ONE if rate == 0.05 else f"one level, rate {rate:g}": TwoTimescales(rate, rate) for rate in GRID
} | {
    PUBLISHED_TWO: TwoTimescales(0.05, 0.8, 0.5),
    "two levels, 0.05 / 0.8, retention 0.9": TwoTimescales(0.05, 0.8, 0.9),
    "two levels, 0.05 / 0.8, no decay": TwoTimescales(0.05, 0.8),
}
#: What the published script prints, in the order of `METRICS`.
PUBLISHED = {
    PUBLISHED_ONE: (1.7994, 3.6090, 655.3868, 2.1846, 2.3417, 0.3843),
    PUBLISHED_TWO: (2.0883, 1.4736, 549.5944, 1.8320, 2.0423, 0.2189),
}


def experiment(full: bool) -> Experiment:
    """One seed is the published data; `full` adds 199 more."""
    arms = [
        Arm(TASK, name, {"": learner}, METRICS, dict(zip(METRICS, PUBLISHED.get(name, ()), strict=False)))
        for name, learner in LEARNERS.items()
    ]
    known = [metric for metric in METRICS if metric != BIAS]
    arms.append(Arm(TASK, "rule and wave known (noise floor)", {"": NoiseFloor()}, known))
    return Experiment(
        name="two-timescales",
        title="Two time scales: a stable rule under a fast context",
        source="A published script of this toy, of which two lines are known: y = 2x + 5 sin(t/4) + noise over 300 "
        "steps, an online linear learner, here by nestling.optim.Levels",
        arms=arms,
        seeds=200 if full else 1,
        notes=(
            "The column of the paper holds the two lines that the published script prints; every other row is ours "
            "alone.",
            "Seed 0 is the published data (numpy's seed 42), and each learner is deterministic given the data: one "
            "seed has no spread, more seeds draw other data.",
            "With the published retention of 0.5 the bias cannot follow the wave: its fixed point is 0.444 of it.",
            "No single rate of the grid reaches a mean error of 0.40 and a slope error of 0.10 together; two levels "
            "without decay do.",
        ),
        draw=draw,
    )


def draw(trials: Sequence[Trial], path: str) -> None:
    """Slope and bias over time for the first seed: who keeps the rule, who follows the wave."""
    from nestling.tuning.reproductions.figure import COLOURS, GREY, canvas, style

    wanted = (PUBLISHED_ONE, PUBLISHED_TWO, "two levels, 0.05 / 0.8, no decay", "one level, rate 0.5")
    first = {trial.model: trial.outcome.details for trial in trials if trial.seed == 0}
    with canvas(path, (9, 6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.axhline(2, color=GREY, linestyle="--", label="what is true: slope 2, and the wave")
        for place, name in enumerate(name for name in wanted if name in first):
            above.plot(first[name]["slopes"], color=COLOURS[place], label=name)
            below.plot(first[name]["biases"], color=COLOURS[place])
            if place == 0:
                below.plot(first[name]["wave"], color=GREY, linestyle="--")
        above.set(ylabel="slope")
        below.set(ylabel="bias", xlabel="step")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        for axes in (above, below):
            style(axes)
