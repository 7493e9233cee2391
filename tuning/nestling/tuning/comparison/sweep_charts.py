"""The charts of a sweep: its objectives against what was varied, against cost, and against how often levels move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from nestling.tuning.comparison.arms import Arm, Metric
from nestling.tuning.comparison.drawing import COLOURS, axes_of, chart, over_training, panels, point
from nestling.tuning.comparison.gather import AXES
from nestling.tuning.comparison.statistics import pareto_front

_ROW = 26  # pixels of an arm in the heat map
_LABEL = 26  # letters of an arm's label beside it


def by_parameter(arms: Sequence[Arm], objectives: Sequence[Metric]) -> go.Figure | None:
    """Each objective against each varied parameter, arms that finished as points with their intervals."""
    known = {metric: [found for found in _measured(arms, metric) if found[1].finished] for metric in objectives}
    shown = [(key, metric) for metric in objectives for key in arms[0].differs if known[metric]]
    if not shown:
        return None
    figure = panels([metric.label for _, metric in shown], 230, shared=False)
    for row, (key, metric) in enumerate(shown, 1):
        values = [arm.differs[key] for arm in arms]
        numbers = _numbers(values)
        for place, arm, measured in known[metric]:
            trace = point(arm, place, (0.0, None), measured)
            trace.update(x=[numbers[place] if numbers else values[place]], error_x=None)
            figure.add_trace(trace, row=row, col=1)
        figure.update_xaxes(title=key, row=row, col=1, **_scale(numbers))
    return figure


def parallel(arms: Sequence[Arm], objectives: Sequence[Metric]) -> go.Figure | None:
    """Parallel coordinates: a line for each arm that finished, through its parameters and what it came to."""
    whole = [arm for arm in arms if arm.finished and all(arm.interval(metric.name) for metric in objectives)]
    if not whole or not whole[0].differs:
        return None
    dimensions = [_dimension(key, [arm.differs[key] for arm in whole]) for key in whole[0].differs]
    for metric in objectives:
        dimensions.append({"label": metric.label, "values": [_mean(arm, metric) for arm in whole]})
    line = {"color": dimensions[len(whole[0].differs)]["values"], "colorscale": [[0, COLOURS[0]], [1, COLOURS[1]]]}
    line["reversescale"] = objectives[0].mode == "max"
    figure = chart()
    hidden = {"size": 1, "color": "rgba(0,0,0,0)"}  # what Plotly writes above and below an axis: its range
    figure.add_trace(go.Parcoords(dimensions=dimensions, line=line, rangefont=hidden))
    left = max(len(text) for text in dimensions[0]["ticktext"])  # Plotly cuts these off, and no margin grows by itself
    return figure.update_layout(margin={"l": max(60, 7 * left), "r": 60, "t": 60, "b": 30})


def by_cost(arms: Sequence[Arm], objectives: Sequence[Metric]) -> go.Figure | None:
    """Each objective against what a run took, with the Pareto front: the arms that nothing cheaper is as good as."""
    shown = [metric for metric in objectives if _measured(arms, metric)]
    if not shown:
        return None
    figure = panels([metric.label for metric in shown], 280)
    for row, metric in enumerate(shown, 1):
        known = [found for found in _measured(arms, metric) if all(found[1].cost(axis) is not None for axis in AXES)]
        means = {arm.label: mean for _, arm, (mean, _) in known}
        places = {arm.label: {axis: float(arm.cost(axis) or 0) for axis in AXES} for _, arm, _ in known}
        fronts = {
            axis: pareto_front({arm: [places[arm][axis], means[arm]] for arm in means}, ["min", metric.mode])
            for axis in AXES
        }
        x = {axis: [places[arm][axis] for arm in front] for axis, front in fronts.items()}
        y = {axis: [means[arm] for arm in front] for axis, front in fronts.items()}
        front = go.Scatter(
            x=x["tokens"],
            y=y["tokens"],
            mode="lines",
            line={"color": "#7c8798", "width": 1.5, "dash": "dot", "shape": "hv"},
            name="Pareto front",
            hoverinfo="skip",
            meta={"x": x, "y": y},
        )
        figure.add_trace(front, row=row, col=1)
        for place, arm, measured in known:
            at = axes_of([places[arm.label]])
            trace = point(arm, place, (at["tokens"][0], None), measured)
            figure.add_trace(trace.update(meta={"x": at}), row=row, col=1)
    return over_training(figure)


def level_frequencies(arms: Sequence[Arm]) -> go.Figure | None:
    """The share of each arm's parameters that move every so many steps, as a heat map."""
    known = [(arm, arm.runs[0].anatomy) for arm in arms if arm.runs[0].anatomy and arm.runs[0].anatomy.periods]
    periods = sorted({period for _, anatomy in known if anatomy for period in anatomy.periods})
    if not periods:
        return None
    counts = [[anatomy.periods.get(period) for period in periods] for _, anatomy in known if anatomy]
    shares = [[count and 100 * count / sum(filter(None, row)) for count in row] for row in counts]
    names = [f"{period:g}" for period in periods]
    figure = chart()
    figure.add_trace(
        go.Heatmap(
            x=names,
            y=[place for place, _ in enumerate(known)],
            z=shares,
            customdata=[[[arm.label, count] for count in row] for (arm, _), row in zip(known, counts, strict=True)],
            text=[["" if share is None else f"{share:.0f} %" for share in row] for row in shares],
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            coloraxis="coloraxis",
            hovertemplate="%{customdata[0]}<br>every %{x} steps: %{customdata[1]:,} parameters<extra></extra>",
        )
    )
    labels = [_short(arm.label) for arm, _ in known]
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(known))), ticktext=labels, showgrid=False)
    figure.update_xaxes(type="category", title="steps from one move to the next")
    return figure.update_layout(height=90 + _ROW * len(known), coloraxis={"showscale": False, "cmin": 0, "cmax": 100})


def _measured(arms: Sequence[Arm], metric: Metric) -> list[tuple[int, Arm, tuple[float, float | None]]]:
    """Place, arm and interval of those that have the metric."""
    return [(place, arm, found) for place, arm in enumerate(arms) if (found := arm.interval(metric.name))]


def _mean(arm: Arm, metric: Metric) -> float:
    found = arm.interval(metric.name)
    assert found is not None
    return found[0]


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The values as numbers; None if one of them is none."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _scale(numbers: Sequence[float] | None) -> dict[str, Any]:
    """How an axis shows a parameter: as names, or as numbers, by their logarithms where they are that far apart."""
    if numbers is None:
        return {"type": "category"}
    different = sorted(set(numbers))
    wide = different[0] > 0 and different[-1] >= 8 * different[0]
    return {"type": "log" if wide else "linear", "tickvals": different, "ticktext": [f"{each:g}" for each in different]}


def _dimension(key: str, values: Sequence[str]) -> dict[str, Any]:
    """An axis of parallel coordinates: its values at equal distances, in their order."""
    numbers = _numbers(values)
    order = sorted(set(values), key=float) if numbers else list(dict.fromkeys(values))
    places = {value: place for place, value in enumerate(order)}
    return {
        "label": _short(key),
        "values": [places[value] for value in values],
        "tickvals": list(places.values()),
        "ticktext": [_short(value) for value in order],
    }


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"
