"""Arms as rows: what differs, what was measured with its interval over the seeds, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nestling.tuning.comparison.arms import Arm, Metric
from nestling.tuning.comparison.gather import AXES
from nestling.tuning.reproductions.table import with_spread

#: Headings of what a run took.
COSTS = {"parameters": "parameters", **AXES}


@dataclass(frozen=True)
class Cell:
    """What a person reads, and the number behind it, if it is one."""

    text: str
    value: float | None = None


def rows(arms: Sequence[Arm], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """One row for each arm, for programs; a `half` is half the width of a 95 % interval over the seeds."""
    return [
        {
            "arm": arm.label,
            "runs": [run.run_id for run in arm.runs],
            "seeds": arm.seeds,
            "states": [run.status for run in arm.runs],
            "differs": arm.differs,
            "metrics": {metric.name: _measured(arm, metric.name) for metric in metrics},
            "parameters": arm.parameters,
            "cost": {axis: arm.cost(axis) for axis in AXES},
        }
        for arm in arms
    ]


def _measured(arm: Arm, metric: str) -> dict[str, Any] | None:
    found, values = arm.interval(metric), arm.values(metric)
    return found and {"mean": found[0], "half": found[1], "seeds": len(values), "values": values}


def headings(arms: Sequence[Arm], metrics: Sequence[Metric]) -> list[str]:
    """What stands above `cells`."""
    return ["arm", *arms[0].differs, "seeds", *(metric.label for metric in metrics), *COSTS.values()]


def cells(arm: Arm, metrics: Sequence[Metric]) -> list[Cell]:
    """A row for people."""
    costs = {"parameters": arm.parameters, **{axis: arm.cost(axis) for axis in AXES}}
    return [
        Cell(arm.label),
        *(Cell(value) for value in arm.differs.values()),
        Cell(_seeds(arm)),
        *(_metric(arm, metric.name) for metric in metrics),
        *(_cost(key, value) for key, value in costs.items()),
    ]


def mean_text(mean: float, half: float | None) -> str:
    """A mean with half of its interval, both to the second digit of that; of one seed four decimals, if it is small."""
    if half is not None:
        return with_spread(mean, half)
    return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4f}"


def _seeds(arm: Arm) -> str:
    """How many, and the state of those that did not come to their end."""
    states = [run.status for run in arm.runs if run.status != "finished"]
    odd = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return ", ".join([str(len(arm.runs)), *odd])


def _metric(arm: Arm, name: str) -> Cell:
    found = arm.interval(name)
    if found is None:
        return Cell("")
    return Cell(mean_text(*found), found[0])


def _cost(key: str, value: float | None) -> Cell:
    if value is None:
        return Cell("")
    text = f"{value:.3g}" if key == "flops" or (key == "seconds" and value < 100) else f"{value:,.0f}"
    return Cell(text, value)
