"""The picture of a reproduction: bars of the table's values beside the paper's numbers, a panel for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

INK, GREY = "#1f2430", "#7a8190"
COLOURS = ("#2f6fde", "#e4572e", "#3a9d5d", "#b8860b", "#7b4fb3", "#2a9da8", "#c2447e", "#5b6475", "#a5552a")
COLUMNS = 3


def bars(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw each task's values, models side by side; diamonds are the paper's numbers, dashes the chance level."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    with canvas(path, (4.2 * columns + 0.4, 3.0 * lines + 0.6)) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for panel, task in zip(panels, tasks, strict=False):
            _panel(panel, [row for row in rows if row["task"] == task], models)
            panel.set_title(task, loc="left", fontsize=11, fontweight="bold", color=INK)
        for panel in list(panels)[len(tasks) :]:
            panel.set_visible(False)
        handles: dict[str, Any] = {}
        for panel in figure.axes:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        names = list(handles)
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


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


def style(axes: Any) -> None:
    """The quiet frame that every panel has."""
    axes.grid(axis="y", color="#e6e8ee", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd6")


def _panel(panel: Any, rows: Sequence[dict[str, Any]], models: Sequence[str]) -> None:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    present = [model for model in models if any(row["model"] == model for row in rows)]
    width = 0.8 / len(present)
    for row in rows:
        colour = COLOURS[models.index(row["model"]) % len(COLOURS)]
        x = metrics.index(row["metric"]) + (present.index(row["model"]) + 0.5) * width - 0.4
        if row["ours"] is not None:
            panel.bar(x, row["ours"], 0.9 * width, color=colour, yerr=row["spread"], ecolor=INK, label=row["model"])
        if row["paper"] is not None:
            panel.scatter(x, row["paper"], marker="D", s=22, color="white", edgecolor=INK, zorder=3, label="paper")
        if row["chance"] is not None:
            panel.hlines(row["chance"], x - width / 2, x + width / 2, color=GREY, linestyle="--", label="chance")
    panel.set_xticks(range(len(metrics)), metrics, fontsize=8)
    style(panel)
