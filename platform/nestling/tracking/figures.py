"""The picture of a run: training and held-out loss over the steps, in bits per byte, beside the unigram line.

The unigram entropy is what a model reaches that knows only how often each byte occurs: a curve that does not get below
it has learnt nothing from context. Drawn without pyplot, so that no display and no global state are involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

TRAIN = "train/bits_per_byte"
HELDOUT = "heldout/bits_per_byte"

_POINTS = 2000  # of a curve: more cannot be told apart in the picture

_INK = "#1f2430"
_BLUE = "#2f6fde"
_ORANGE = "#e4572e"
_GREY = "#7a8190"


def loss_figure(records: Sequence[Mapping[str, float]], path: Path, unigram: float | None, title: str) -> None:
    """Draw the curves of a run into a picture of 1200 x 600 pixels.

    Args:
        records: the records of `log.jsonl`, each with `step` and any of `train/bits_per_byte`, `heldout/bits_per_byte`.
        path: file to write, its suffix giving the format (.png, .svg).
        unigram: unigram entropy of the held-out text in bits per byte, drawn as a dashed line; None leaves it out.
        title: what stands above the curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, heldout = _curve(records, TRAIN), _curve(records, HELDOUT)
    if unigram is not None:
        axes.axhline(
            unigram, color=_GREY, linewidth=1.5, linestyle=(0, (6, 4)), label=f"unigram entropy  {unigram:.2f}"
        )
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=_BLUE, linewidth=1, alpha=0.3)
        axes.plot(steps, _smoothed(losses), color=_BLUE, linewidth=2.2, label=f"training  {_smoothed(losses)[-1]:.2f}")
    if heldout:
        steps, losses = zip(*heldout, strict=True)
        axes.plot(
            steps, losses, color=_ORANGE, linewidth=2.2, marker="o", markersize=6, label=f"held out  {losses[-1]:.2f}"
        )
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=_INK, pad=14)
    axes.set_xlabel("optimizer steps", fontsize=12, color=_INK)
    axes.set_ylabel("loss, bits per byte", fontsize=12, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#e6e8ee", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=11, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd6")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=12, labelcolor=_INK, framealpha=0.9, edgecolor="none")
    figure.savefig(path)


def _curve(records: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """The points of a curve; of a long one means over runs of neighbours."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return points
    runs = (points[begin : begin + size] for begin in range(0, len(points), size))
    return [(sum(step for step, _ in run) / len(run), sum(value for _, value in run) / len(run)) for run in runs]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last twentieth of the points, so that single batches do not hide the trend."""
    window = max(1, len(values) // 20)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
