"""Runs beside each other: from their folders to rows and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.tracking import RunFolder
from nestling.tuning.comparison import charts
from nestling.tuning.comparison.answer import answer
from nestling.tuning.comparison.arms import Arm, Metric, arms_of, metrics_of
from nestling.tuning.comparison.gather import read_run
from nestling.tuning.comparison.page import Chart, Page
from nestling.tuning.comparison.table import rows


@dataclass(frozen=True)
class Comparison:
    """Arms, what they are compared by, and what that says in words."""

    arms: list[Arm]
    metrics: list[Metric]
    answer: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each arm; see `nestling.tuning.comparison.table.rows`."""
        return rows(self.arms, self.metrics)

    def write(self, path: Path, command: str) -> None:
        """Write the page; `command` is what makes it again."""
        labels = [arm.label for arm in self.arms]
        title = " and ".join(labels) if len(labels) < 3 else f"{len(labels)} arms compared"
        Page(title, [self.answer], self.arms, self.metrics, charts_of(self.arms), command).write(path)


def compare(folders: Sequence[RunFolder]) -> Comparison:
    """Compare runs; one that is given twice counts once.

    Raises:
        ComparisonError: fewer than two runs, or one that has logged nothing.
    """
    different = dict.fromkeys(folders)
    arms = arms_of([read_run(folder) for folder in different])
    metrics = metrics_of(arms)
    _, said = answer(arms, metrics[:1])
    return Comparison(arms, metrics, said)


def charts_of(arms: Sequence[Arm]) -> list[Chart]:
    """Every chart that these runs have something for."""
    band = "Lines are means over the seeds, bands go from the lowest seed to the highest."
    curves = [
        Chart(key.replace("/", "-"), heading, charts.learning_curves(arms, key))
        for key, heading in charts.CURVES.items()
    ]
    others = [
        Chart(
            "by-position",
            "Held-out loss by place in the sequence, bits per byte",
            charts.by_position(arms),
            "A model that makes use of what it has read gets better from left to right.",
        ),
        Chart(
            "update-norms",
            "How far each level moved since the record before",
            charts.update_norms(arms),
            "Norm of the change of its weights; logarithmic.",
        ),
        Chart(
            "retention",
            "Loss on the probes of each domain over the stream",
            charts.retention(arms),
            "From left to right what became of each domain while others were learnt.",
        ),
        Chart(
            "frontier",
            "What was learnt against what was lost again",
            charts.frontier(arms),
            "Who moves slowly forgets little and learns little: better is below and left.",
        ),
    ]
    drawn = [chart for chart in curves + others if chart.figure is not None]
    return [Chart(drawn[0].name, drawn[0].heading, drawn[0].figure, band), *drawn[1:]] if drawn else []
