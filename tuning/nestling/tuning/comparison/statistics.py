"""What can be said of arms that were tried with the same seeds.

Arms share their data order seed by seed, so a difference is taken within a seed before it is averaged: what makes a
seed easy or hard for everybody drops out (a paired t interval). An arm wins only if it beats each other one so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Literal

#: Probability with which an interval holds the mean of more seeds, as far as they scatter like a normal distribution.
CONFIDENCE = 0.95

Mode = Literal["min", "max"]
#: Of each arm the values of a metric, by seed.
Values = Mapping[str, Mapping[int, float]]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the values and half the width of its interval by Student's t; None for one value."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """How far one arm is from another over the seeds that both have; below 0: it is lower.

    Attributes:
        mean: mean of the differences.
        half: half the width of their interval; None for a single seed.
        seeds: number of pairs.
    """

    mean: float
    half: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """`own` minus `other`, seed by seed; None where no seed is in both."""
    pairs = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    return Difference(*interval(pairs), len(pairs)) if pairs else None


@dataclass(frozen=True)
class Verdict:
    """Who is best, and whether that can be told.

    Attributes:
        best: the arm with the best mean.
        against: of every other arm, from the next best on, `best` minus that arm; None where no seed is in both.
        unclear: the arms that `best` has not been shown to beat: their interval reaches zero, or there is none.
    """

    best: str
    against: dict[str, Difference | None]
    unclear: list[str]

    @property
    def wins(self) -> bool:
        """Whether there are other arms and all of them are beaten."""
        return bool(self.against) and not self.unclear


def verdict(values: Values, mode: Mode) -> Verdict:
    """The best of at least one arm; no arm wins alone.

    Who wins has beaten each other arm at the 5 % level, so their number needs no correction (an intersection-union
    test, Berger 1982): of two arms that are equally good, one is taken for the winner in one case of twenty at most.
    """
    ranked = sorted(values, key=lambda arm: _sign(mode) * fmean(values[arm].values()))
    best, *others = ranked
    against = {arm: paired(values[best], values[arm]) for arm in others}
    unclear = [
        arm
        for arm, difference in against.items()
        if difference is None or not difference.excludes_zero or _sign(mode) * difference.mean > 0
    ]
    return Verdict(best, against, unclear)


def pareto_front(points: Mapping[str, Sequence[float]], modes: Sequence[Mode]) -> list[str]:
    """The arms that no other one beats or equals in everything and beats in something, in the order of the first value.

    Args:
        points: of each arm its values.
        modes: for each value whether "min" or "max" is better.
    """
    turned = {
        arm: [_sign(mode) * value for mode, value in zip(modes, values, strict=True)] for arm, values in points.items()
    }

    def beaten(own: Sequence[float]) -> bool:
        return any(
            other != own and all(theirs <= mine for theirs, mine in zip(other, own, strict=True))
            for other in turned.values()
        )

    return sorted((arm for arm, own in turned.items() if not beaten(own)), key=lambda arm: turned[arm])


@cache
def _quantile(freedom: int) -> float:
    """Of Student's t: so many standard errors are half an interval."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _sign(mode: Mode) -> int:
    return 1 if mode == "min" else -1
