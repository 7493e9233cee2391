"""What the charts of a comparison are made of: Plotly's own traces, in the colours of the arms.

Colours of text and grid are the page's, which knows light from dark. A trace that can be drawn over tokens, seconds or
FLOPs has all three in its `meta`, under "x" (and "y" where that changes as well), and is drawn over tokens; the page's
buttons put another one into its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nestling.tuning.comparison.arms import Arm
from nestling.tuning.comparison.gather import AXES
from nestling.tuning.comparison.statistics import interval

#: Of the arms, in their order; readable on white and on near-black. Then they begin anew, with other dashes.
COLOURS = ("#3b7de0", "#e4572e", "#2f9e68", "#a06be0", "#c98a0c", "#0f97a3", "#d0508c", "#7c8798")
_DASHES = ("solid", "dot", "dash", "dashdot")
_HEIGHT, _PANEL = 340, 190  # pixels: of one chart, and of each panel of several above each other


def colour(place: int) -> str:
    """Of the arm at a place in their order."""
    return COLOURS[place % len(COLOURS)]


def chart() -> go.Figure:
    """One chart without anything in it."""
    return go.Figure(layout={"template": None, "height": _HEIGHT, "showlegend": False, "hovermode": "closest"})


def panels(titles: Sequence[str], height: int = _PANEL, shared: bool = True) -> go.Figure:
    """Panels above each other, over one axis if `shared`."""
    total = height * len(titles) + 60
    gap = 36 if shared else 72
    figure = make_subplots(
        rows=len(titles), cols=1, shared_xaxes=shared, subplot_titles=titles, vertical_spacing=gap / total
    )
    figure.update_layout(template=None, height=total, showlegend=False, hovermode="closest", margin_t=32)
    figure.update_annotations(x=0, xanchor="left", yshift=4, font_size=13)
    return figure


def over_training(figure: go.Figure) -> go.Figure:
    """The lowest axis says what it counts."""
    lowest = max(figure.select_xaxes(), key=lambda axis: int(axis.plotly_name.removeprefix("xaxis") or "1"))
    lowest.update(title=AXES["tokens"])
    return figure


def band(
    x: Mapping[str, Sequence[float]],
    rows: Sequence[Sequence[float]],
    arm: Arm,
    place: int,
    mode: str = "lines",
) -> list[go.Scatter]:
    """The line of an arm's means over the band from its lowest seed to its highest.

    Args:
        x: places on every axis that it can be drawn over, first the one that it is drawn over.
        rows: of each seed its values at these places.
        arm, place: whose it is, and the arm's place in their order.
        mode: of the line.
    """
    columns = list(zip(*rows, strict=True))
    means, halves = zip(*map(interval, columns), strict=True)
    common = {"name": arm.label, "legendgroup": arm.label}
    line = go.Scatter(
        x=_first(x),
        y=means,
        mode=mode,
        line={"color": colour(place), "width": 2, "dash": _DASHES[place // len(COLOURS) % len(_DASHES)]},
        customdata=["" if half is None else f" ± {half:.4f}" for half in halves],
        hovertemplate="%{y:.4f}%{customdata}<br>%{x:,.4g}<extra>%{fullData.name}</extra>",
        meta={"x": dict(x)},
        **common,
    )
    if len(rows) == 1:
        return [line]
    around = {axis: [*values, *reversed(values)] for axis, values in x.items()}
    filled = go.Scatter(
        x=_first(around),
        y=[*map(max, columns), *reversed([*map(min, columns)])],
        fill="toself",
        fillcolor=colour(place),
        opacity=0.15,
        mode="none",
        hoverinfo="skip",
        meta={"x": around},
        **common,
    )
    return [filled, line]


def point(arm: Arm, place: int, x: tuple[float, float | None], y: tuple[float, float | None]) -> go.Scatter:
    """An arm as a point at two means, with their intervals."""
    whiskers = {"thickness": 1, "width": 0}
    return go.Scatter(
        x=[x[0]],
        y=[y[0]],
        error_x={"array": [x[1] or 0], **whiskers},
        error_y={"array": [y[1] or 0], **whiskers},
        mode="markers",
        marker={"size": 10, "color": colour(place)},
        name=arm.label,
        legendgroup=arm.label,
        hovertemplate="%{y:.4f}<br>%{x:,.4g}<extra>%{fullData.name}</extra>",
    )


def axes_of(places: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Places in a training on every axis."""
    return {axis: [place[axis] for place in places] for axis in AXES}


def _first(x: Mapping[str, Sequence[float]]) -> Sequence[float]:
    return next(iter(x.values()))
