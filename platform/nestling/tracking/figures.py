"""The picture of a run: training and held-out loss over the steps, in bits per byte, beside the unigram line; of a
stream, the loss before learning and the probes of every domain.

The unigram entropy is what a model reaches that knows only how often each byte occurs: a curve that does not get below
it has learnt nothing from context. Drawn without pyplot, so that no display and no global state are involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN = "train/bits_per_byte"
HELDOUT = "heldout/bits_per_byte"
FADING = "prequential/fading_bits_per_byte"

_POINTS = 2000  # of a curve: more cannot be told apart in the picture

_INK = "#1f2430"
_BLUE = "#2f6fde"
_ORANGE = "#e4572e"
_GREY = "#7a8190"
_COLOURS = (_BLUE, _ORANGE, "#2a9d6f", "#9b5de5", "#c78a00", "#00838f", "#b23a6b", "#5c6b2f")


def loss_figure(records: Sequence[Mapping[str, float]], path: Path, unigram: float | None, title: str) -> None:
    """Draw the curves of a run into a picture of 1200 x 600 pixels.

    Args:
        records: the records of `log.jsonl`, each with `step` and any of `train/bits_per_byte`, `heldout/bits_per_byte`.
        path: file to write, its suffix giving the format (.png, .svg).
        unigram: unigram entropy of the held-out text in bits per byte, drawn as a dashed line; None leaves it out.
        title: what stands above the curves.
    """
    figure, axes = _canvas()
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
    _finish(axes, title)
    figure.savefig(path)


def stream_figure(
    records: Sequence[Mapping[str, float]], path: Path, drifts: Sequence[int], title: str, probes: Sequence[str]
) -> None:
    """Draw what a stream was lost at before it was learnt, and what is kept of each domain, into 1200 x 600 pixels.

    Args:
        records: the records of `log.jsonl`.
        path: file to write, its suffix giving the format (.png, .svg).
        drifts: steps at which the detector gave the alarm, drawn as vertical lines.
        title: what stands above the curves.
        probes: keys of the probes' losses, `probe/<domain>/bits_per_byte`.
    """
    figure, axes = _canvas()
    for number, step in enumerate(drifts):
        label = f"drift alarm ({len(drifts)})" if number == 0 else None
        axes.axvline(step, color=_GREY, linewidth=1.2, linestyle=(0, (2, 3)), label=label)
    faded = _curve(records, FADING)
    if faded:
        steps, losses = zip(*faded, strict=True)
        axes.plot(steps, losses, color=_INK, linewidth=2.2, label=f"before learning  {losses[-1]:.2f}")
    for number, key in enumerate(probes):
        steps, losses = zip(*_curve(records, key), strict=True)
        name = key.removeprefix("probe/").removesuffix("/bits_per_byte")
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            steps, losses, color=colour, linewidth=1.8, marker="o", markersize=5, label=f"{name}  {losses[-1]:.2f}"
        )
    _finish(axes, title)
    figure.savefig(path)


def _canvas() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(axes: Any, title: str) -> None:
    """Title, axes and legend, the same in all pictures of a run."""
    from matplotlib.ticker import MaxNLocator

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
