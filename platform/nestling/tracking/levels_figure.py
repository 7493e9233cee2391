"""The picture of a nested system: how often each component is updated, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nestling.models.component import GRADIENTS, TOKENS, Component

_INK = "#1f2430"
_COLOURS = {TOKENS: "#2f6fde", GRADIENTS: "#e4572e"}
#: Points from the axis to the middle of the levels' column, and to the right of the names'; size of both.
_LEVEL, _NAME, _SIZE = -24, -52, 10.5
_SAID = {TOKENS: "compresses tokens", GRADIENTS: "compresses gradients"}


def levels_figure(parts: Sequence[tuple[Component, int]], path: Path, title: str) -> None:
    """Draw components and their levels, fastest first, into a picture whose height follows their number.

    Args:
        parts: components with their levels, from the fastest to the slowest.
        path: file to write, its suffix giving the format (.png, .svg).
        title: what stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15)
    figure = Figure(figsize=(12, 2.3 + 0.27 * len(parts)), dpi=100, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = min(part.updates_per_token for part, _ in parts if part.updates_per_token) / 4
    levels = [level for _, level in parts]
    for level in sorted(set(levels)):
        places = [place for place, other in enumerate(levels) if other == level]
        if level % 2 == 0:
            axes.axhspan(places[0] - 0.5, places[-1] + 0.5, color="#f4f5f8", linewidth=0, zorder=0)
    for context, colour in _COLOURS.items():
        chosen = [(place, part) for place, (part, _) in enumerate(parts) if part.context == context]
        if chosen:
            heights, rates = [place for place, _ in chosen], [max(part.updates_per_token, left) for _, part in chosen]
            axes.hlines(heights, left, rates, color=colour, linewidth=1.6, alpha=0.45)
            axes.plot(rates, heights, "o", color=colour, markersize=7, label=_SAID[context])
    axes.set_xscale("log")
    axes.set_xlim(left, 4)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_yticks(range(len(parts)), [part.name for part, _ in parts])
    write = partial(axes.annotate, textcoords="offset points", fontsize=_SIZE, color=_INK, annotation_clip=False)
    for place, level in enumerate(levels):
        write(str(level), (0, place), (_LEVEL, 0), axes.get_yaxis_transform(), ha="center", va="center_baseline")
    heading: dict[str, Any] = {"va": "bottom", "color": "#7a8190"}
    write("nested\nlevel", (0, 1), (_LEVEL, 6), "axes fraction", ha="center", **heading)
    write("component", (0, 1), (_NAME, 6), "axes fraction", ha="right", **heading)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=_INK, pad=46)
    axes.set_xlabel("updates per token (of its sequence, or of the batch), logarithmic", fontsize=12, color=_INK)
    axes.grid(axis="x", color="#e6e8ee", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=_SIZE, length=0)
    axes.tick_params(axis="y", pad=-_NAME)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd6")
    axes.legend(loc="lower right", fontsize=11, labelcolor=_INK, framealpha=0.95, edgecolor="none")
    figure.savefig(path)
