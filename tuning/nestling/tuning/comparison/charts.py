"""The charts of runs: curves over the training with bands over the seeds, places in the sequence, levels, domains.

A chart is None where the runs have nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import plotly.graph_objects as go

from nestling.tuning.comparison.arms import Arm
from nestling.tuning.comparison.drawing import axes_of, band, chart, over_training, panels, point
from nestling.tuning.comparison.gather import AXES, Run
from nestling.tuning.comparison.statistics import interval

#: What is drawn over the training: key of the log, heading.
CURVES = {
    "heldout/bits_per_byte": "Held-out loss, bits per byte",
    "train/bits_per_byte": "Training loss, bits per byte",
    "prequential/fading_bits_per_byte": "Loss before learning, bits per byte",
    "probe/mean_bits_per_byte": "Probes, mean over domains, bits per byte",
    "probe/forgetting": "Forgetting, bits per byte",
}
#: Points of a curve; more cannot be told apart.
_POINTS = 400


def learning_curves(arms: Sequence[Arm], key: str) -> go.Figure | None:
    """A metric of the log; None where no arm has two points of it, or it is always 0."""
    figure = chart()
    for place, arm in enumerate(arms):
        figure.add_traces(_curve(arm, place, key))
    return over_training(figure) if any(len(set(trace.x)) > 1 and any(trace.y) for trace in figure.data) else None


def update_norms(arms: Sequence[Arm]) -> go.Figure | None:
    """How far each level's weights moved since the record before, a panel for each level."""
    keys = [key for key in _keys((run for arm in arms for run in arm.runs), "levels/") if key.endswith("/update_norm")]
    curves = {key: [_curve(arm, place, key, positive=True) for place, arm in enumerate(arms)] for key in keys}
    curves = {key: lines for key, lines in curves.items() if any(lines)}
    if not curves:
        return None
    figure = panels([key.split("/")[1] for key in curves])
    for row, lines in enumerate(curves.values(), 1):
        for traces in lines:
            figure.add_traces(traces, rows=row, cols=1)
    figure.update_yaxes(type="log", dtick="D2")
    return over_training(figure)


def by_position(arms: Sequence[Arm]) -> go.Figure | None:
    """Held-out loss in equal stretches of the sequence."""
    figure = chart()
    for place, arm in enumerate(arms):
        measured = [run.by_position for run in arm.runs if run.by_position]
        if measured:
            count = min(map(len, measured))
            stretches = [100 * (stretch + 0.5) / count for stretch in range(count)]
            figure.add_traces(band({"place": stretches}, measured, arm, place, "lines+markers"))
    if not figure.data:
        return None
    return figure.update_xaxes(title="place in the sequence, %", range=[0, 100])


def retention(arms: Sequence[Arm]) -> go.Figure | None:
    """The loss on each domain's probes over the training, a panel for each arm, mean over the seeds.

    It is the matrix of continual learning with time in place of the numbers of domains; None with fewer than two.
    """
    domains = _domains(run for arm in arms for run in arm.runs)
    probed = [(arm, steps) for arm in arms if (steps := _common_steps(arm.runs, "probe/mean_bits_per_byte"))]
    if len(domains) < 2 or not probed:
        return None
    figure = panels([arm.label for arm, _ in probed], 60 + 26 * len(domains))
    for row, (arm, steps) in enumerate(probed, 1):
        x = _places(arm.runs, steps)
        matrix = go.Heatmap(
            x=x["tokens"],
            y=domains,
            z=[_domain_losses(arm, f"probe/{domain}/bits_per_byte", steps) for domain in domains],
            name=arm.label,
            meta={"x": x},
            coloraxis="coloraxis",
            hovertemplate="%{y}: %{z:.4f}<br>%{x:,.4g}<extra>%{fullData.name}</extra>",
        )
        figure.add_trace(matrix, row=row, col=1)
    figure.update_layout(
        coloraxis_colorbar={"thickness": 10, "len": 160, "lenmode": "pixels", "y": 1, "yanchor": "top"}
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return over_training(figure)


def frontier(arms: Sequence[Arm]) -> go.Figure | None:
    """What was learnt of the domains against what was lost of it again; None with fewer than two domains.

    Across, the mean over domains of the lowest loss on their probes; up, of the last loss minus the lowest.
    """
    figure = chart()
    for place, arm in enumerate(arms):
        points = [found for run in arm.runs if (found := _learnt_and_lost(run))]
        if points:
            learnt, lost = (interval(values) for values in zip(*points, strict=True))
            figure.add_trace(point(arm, place, learnt, lost))
    if not figure.data:
        return None
    figure.update_xaxes(title="lowest loss so far, mean over domains")
    return figure.update_yaxes(title="forgetting")


def _curve(arm: Arm, place: int, key: str, positive: bool = False) -> list[go.Scatter]:
    """A metric at the steps that all seeds have logged; empty if there are none."""
    known = [run for run in arm.runs if any(key in record for record in run.records)]
    steps = _thinned(_common_steps(known, key, positive))
    if not steps:
        return []
    return band(_places(known, steps), [_values(run, key, steps) for run in known], arm, place)


def _common_steps(runs: Sequence[Run], key: str, positive: bool = False) -> list[int]:
    """The steps at which all runs have logged `key`, only those with values above 0 if a logarithm is taken."""
    logged = [
        {int(record["step"]) for record in run.records if key in record and (record[key] > 0 or not positive)}
        for run in runs
    ]
    return sorted(set.intersection(*logged)) if logged else []


def _values(run: Run, key: str, steps: Sequence[int]) -> list[float]:
    logged = {int(record["step"]): record[key] for record in run.records if key in record}
    return [logged[step] for step in steps]


def _places(runs: Sequence[Run], steps: Sequence[int]) -> dict[str, list[float]]:
    """Where these steps are on every axis, mean over the runs."""
    return axes_of([{axis: fmean(run.places[step][axis] for run in runs) for axis in AXES} for step in steps])


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    """Evenly chosen steps, from the first to the last."""
    if len(steps) <= _POINTS:
        return steps
    return [steps[number * (len(steps) - 1) // (_POINTS - 1)] for number in range(_POINTS)]


def _keys(runs: Iterable[Run], prefix: str) -> list[str]:
    """Of the log, in the order in which they came."""
    return list(
        dict.fromkeys(key for run in runs for record in run.records for key in record if key.startswith(prefix))
    )


def _domains(runs: Iterable[Run]) -> list[str]:
    """Of all probes."""
    return [key.split("/")[1] for key in _keys(runs, "probe/") if key.count("/") == 2]


def _domain_losses(arm: Arm, key: str, steps: Sequence[int]) -> list[float | None]:
    """Means over the seeds; None at steps before the domain had come in each of them."""
    logged = [{int(record["step"]): record[key] for record in run.records if key in record} for run in arm.runs]
    return [fmean(run[step] for run in logged) if all(step in run for run in logged) else None for step in steps]


def _learnt_and_lost(run: Run) -> tuple[float, float] | None:
    keys = [f"probe/{domain}/bits_per_byte" for domain in _domains([run])]
    if len(keys) < 2:
        return None
    curves = [[record[key] for record in run.records if key in record] for key in keys]
    return fmean(map(min, curves)), fmean(curve[-1] - min(curve) for curve in curves)
