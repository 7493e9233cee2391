"""What a sweep found: the page, the figures, and the answer in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from nestling.tracking import RunFolder
from nestling.tuning.sweeps.config import SweepConfig
from nestling.tuning.sweeps.outcome import Lines


@dataclass(frozen=True)
class Found:
    """The result of a sweep.

    Attributes:
        answer: what was found, in words.
        best: label of the arm whose mean objective is best; None if no trial came to its end.
        page: the comparison as an HTML page.
        figures: HTML files by what they show.
    """

    answer: str
    best: str | None
    page: Path | None = None
    figures: dict[str, Path] = field(default_factory=dict)


def report(folder: RunFolder, runs_dir: Path, sweep: SweepConfig) -> Found:
    """Compare the trials of a sweep."""
    return _means(folder, sweep)


def _means(folder: RunFolder, sweep: SweepConfig) -> Found:
    objective = sweep.objectives[0]
    values: dict[str, list[float]] = defaultdict(list)
    for outcome in Lines(folder).outcomes().values():
        if outcome.state == "finished" and objective.metric in outcome.objectives:
            values[outcome.arm].append(outcome.objectives[objective.metric])
    if not values:
        return Found("no trial came to its end", None)
    means = {arm: statistics.fmean(some) for arm, some in values.items()}
    best = (min if objective.mode == "min" else max)(means, key=lambda arm: means[arm])
    said = f"the best mean {objective.metric} is {means[best]:.4g}, of {best}, over {len(values[best])} seeds"
    return Found(said, best)
