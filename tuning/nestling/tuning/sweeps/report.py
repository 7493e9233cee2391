"""What a sweep found: the page, the figures, and the answer in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nestling.tracking import RunFolder
from nestling.tuning.comparison import ComparisonError, sweep_report


@dataclass(frozen=True)
class Found:
    """The result of a sweep.

    Attributes:
        answer: what was found, in words.
        best: label of the arm whose mean objective is best; None if no trial came to its end.
        page: the comparison as an HTML page.
        figures: HTML files by what they show.
    """

    answer: str
    best: str | None
    page: Path | None = None
    figures: dict[str, Path] = field(default_factory=dict)


def report(folder: RunFolder, runs_dir: Path) -> Found:
    """Compare the trials of a sweep, as far as they have ended."""
    try:
        made = sweep_report(folder, runs_dir)
    except ComparisonError as error:
        return Found(str(error), None)
    return Found(made.answer, made.best, made.page, made.figures)
