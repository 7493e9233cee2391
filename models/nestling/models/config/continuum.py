"""Configuration of levels that move while a model reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nestling.models.config.skeleton import check_choice, require


@dataclass
class ContinuumConfig:
    """What drives the Continuum Memory System's levels, and how they move inside a text (arXiv:2512.24695, Eq. 71)."""

    #: schedule: training alone moves levels, at their periods; stream: they also move while the trained model reads
    #: (evaluation, generation), every text by itself; meta: in training too, and the outer gradient passes through.
    drive: Literal["schedule", "stream", "meta"] = "schedule"
    #: Tokens read from one move of a level to its next, one for each level, fastest first.
    periods: list[int] = field(default_factory=list)
    #: Step size of each level, on the mean error of its period's tokens; 0: the level stays.
    rates: list[float] = field(default_factory=list)
    #: task: the gradient of the next-token loss; local: Delta Gradient Descent in each layer.
    error: Literal["task", "local"] = "task"
    #: Of meta: also differentiate the inner gradients. HOPE's memories then run token by token, which is slow.
    second_order: bool = False

    def __post_init__(self) -> None:
        check_choice("continuum.drive", self.drive, ("schedule", "stream", "meta"))
        check_choice("continuum.error", self.error, ("task", "local"))
        require(
            all(type(period) is int and period >= 1 for period in self.periods),
            f"continuum.periods: got {list(self.periods)}, needs whole numbers of at least 1",
        )
        require(
            all(0 <= rate < math.inf for rate in self.rates),
            f"continuum.rates: got {list(self.rates)}, needs finite numbers of at least 0",
        )

    def check(self, levels: Sequence[str], nested: bool) -> None:
        """Raises ValueError if these settings do not fit the levels of these names, nested or not."""
        require(
            bool(levels), "continuum: the model has no level that could move; give it levels with a width or layers"
        )
        given = f"continuum: got {len(self.periods)} periods and {len(self.rates)} rates"
        needs = f"needs {len(levels)} of each, for {', '.join(levels)}"
        require(len(self.periods) == len(self.rates) == len(levels), f"{given}, {needs}")
        require(
            not nested or not _unnested(self.periods),
            f"continuum.periods: got {list(self.periods)}, nested levels need each to be a multiple of the one before",
        )


def _unnested(periods: Sequence[int]) -> bool:
    return any(slow % fast for fast, slow in zip(periods, periods[1:], strict=False))
