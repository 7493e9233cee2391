"""The picture of a reproduction: our values beside the paper's numbers, a panel for each task and unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

INK, GREY = "#1f2430", "#7a8190"
COLOURS = ("#2f6fde", "#e4572e", "#3a9d5d", "#b8860b", "#7b4fb3", "#2a9da8", "#c2447e", "#5b6475", "#a5552a")
COLUMNS = 3


def bars(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw a panel for each task and unit, models below each other.

    Whiskers go from the lowest seed to the highest; diamonds are the paper's numbers, dashes chance.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["task"], row["unit"]), []).append(row)
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["ours"] is not None))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len({row["model"] for row in members}) for members in panels.values())
    with canvas(path, (max(4.2 * columns + 0.4, 7), lines * (0.9 + 0.3 * most) + 0.6)) as figure:
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for panel, ((task, unit), members) in zip(axes, panels.items(), strict=False):
            _panel(panel, members, metrics)
            panel.set_title(task, loc="left", fontsize=11, fontweight="bold", color=INK)
            panel.set_xlabel(unit, fontsize=9, color=INK)
        for panel in list(axes)[len(panels) :]:
            panel.set_visible(False)
        handles: dict[str, Any] = {}
        for panel in figure.axes:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        names = list(handles)
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], path: str, labels: tuple[str, str], log: bool) -> None:
    """Draw named curves of (x, y) points; `labels` name the axes, `log` makes the x-axis logarithmic."""
    with canvas(path, (8, 4.2)) as figure:
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLOURS[place % len(COLOURS)], marker="o", markersize=3, label=name)
        if log:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        style(axes)
        axes.legend(frameon=False, fontsize=9)


@contextmanager
def canvas(path: str, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written to `path` at the end; without pyplot, so no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path)


def style(axes: Any, values: str = "y") -> None:
    """The quiet frame that every panel has; its grid is on the axis of the values."""
    axes.grid(axis=values, color="#e6e8ee", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd6")


def _panel(panel: Any, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """The bars of a model's metrics stand together; what only the paper measured is a diamond on the model's line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    present = [metric for metric in metrics if any(row["metric"] == metric and row["ours"] is not None for row in rows)]
    height = 0.8 / max(len(present), 1)
    for row in rows:
        measured, y = row["metric"] in present, float(models.index(row["model"]))
        thick = height if measured else 0.8
        if measured:
            y += (present.index(row["metric"]) + 0.5) * height - 0.4
        if row["ours"] is not None:
            colour = COLOURS[metrics.index(row["metric"]) % len(COLOURS)]
            seeds = [[row["ours"] - row["lowest"]], [row["highest"] - row["ours"]]] if row["spread"] else None
            panel.barh(y, row["ours"], 0.9 * thick, color=colour, xerr=seeds, ecolor=INK, label=row["metric"])
        if row["paper"] is not None:
            panel.scatter(
                row["paper"], y, marker="D", s=22, color="white", edgecolor=INK, zorder=3, clip_on=False, label="paper"
            )
        if row["chance"] is not None:
            panel.vlines(row["chance"], y - thick / 2, y + thick / 2, color=GREY, linestyle="--", label="chance")
    panel.set_yticks(range(len(models)), models)
    panel.set_ylim(len(models) - 0.5, -0.5)
    style(panel, "x")
