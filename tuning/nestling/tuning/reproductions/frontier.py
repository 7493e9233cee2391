"""What is learnt against what is kept: the tables and the picture of a comparison on a stream of domains.

One number decides nothing here: whoever moves slowly forgets little and learns little. So arms that differ in their
rate alone are drawn as a line, and a method is better only where it lies below and left of such a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from nestling.tuning.comparison.statistics import interval
from nestling.tuning.reproductions.experiment import Trial
from nestling.tuning.reproductions.table import number

MARKERS = "osD^vPX*<>hdp8"


def by_arm(trials: Sequence[Trial], metric: str) -> dict[str, dict[int, float]]:
    """The finite values of a metric, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for trial in trials:
        value = trial.outcome.metrics.get(metric, math.nan)
        if math.isfinite(value):
            found.setdefault(trial.model, {})[trial.seed] = value
    return found


def differences(values: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, dict[int, float]]:
    """Each arm's values minus those of the reference, by seed; seeds and arms without a pair are left out."""
    base = values.get(reference, {})
    paired = {
        arm: {seed: own[seed] - base[seed] for seed in own.keys() & base.keys()}
        for arm, own in values.items()
        if arm != reference
    }
    return {arm: pairs for arm, pairs in paired.items() if pairs}


def table(columns: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """A line for each arm and a column for each metric, with mean ± half of the interval; empty: not known.

    Args:
        columns: by heading, values by arm and seed.
    """
    arms = dict.fromkeys(arm for values in columns.values() for arm in values)
    lines = [f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms:
        cells = [_cell([*values[arm].values()]) if arm in values else "" for values in columns.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return number(mean) if half is None else f"{mean:.2f} ± {half:.2f}"


def matrix(trials: Sequence[Trial], arm: str, domains: Sequence[str]) -> str:
    """The losses of an arm on every domain before the first and after each, mean over the seeds; empty if none."""
    losses = [trial.outcome.details["losses"] for trial in trials if trial.model == arm]
    if not losses:
        return ""
    lines = [f"| {arm} after | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for name, *rows in zip(("nothing", *domains), *losses, strict=True):
        means = [fmean(column) for column in zip(*rows, strict=True)]
        lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def draw(trials: Sequence[Trial], path: str, metrics: tuple[str, str], lines: Mapping[str, Sequence[str]]) -> None:
    """Arms as points with their intervals; lower left is better.

    Args:
        metrics: what is drawn across and up; arms that lack one are left out.
        lines: what each line is called, and the arms that it joins, in this order; every other arm is a point.
    """
    from nestling.tuning.reproductions.figure import COLOURS, canvas, style

    across, up = (by_arm(trials, metric) for metric in metrics)
    joined = {arm for members in lines.values() for arm in members}
    groups = {**lines, **{arm: [arm] for arm in across if arm not in joined}}
    with canvas(path, (9.5, 7)) as figure:
        axes = figure.add_subplot()
        for place, (name, members) in enumerate(groups.items()):
            known = [arm for arm in members if arm in across and arm in up]
            x, y = ([interval([*values[arm].values()]) for arm in known] for values in (across, up))
            axes.errorbar(
                [mean for mean, _ in x],
                [mean for mean, _ in y],
                xerr=[half or 0.0 for _, half in x],
                yerr=[half or 0.0 for _, half in y],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if name in lines else "none",
                elinewidth=0.8,
                label=name,
            )
        axes.set(xlabel=metrics[0], ylabel=metrics[1])
        style(axes)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
