"""How a training's progress is shown, on a terminal and without one."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from nestling.config import TrainingConfig
from nestling.jobs import progress
from nestling.jobs.progress import TrainingProgress, duration

TRAINING = TrainingConfig(steps=100, batch_tokens=1000)
RECORDS = [
    {"step": 10, "train/loss": 3.5, "train/tokens_per_second": 500.0},
    {"step": 20, "train/loss": 3.25, "train/tokens_per_second": 500.0},
    {"step": 30, "train/loss": 3.0, "train/tokens_per_second": 500.0, "heldout/bits_per_byte": 4.25},
    {"step": 100, "train/loss": 2.0},
]


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(TRAINING) as show:
        for record in RECORDS:
            show(record)
    assert capsys.readouterr().err.splitlines() == [
        "starting Ray, preparing data",
        "step 10/100  loss 3.500  500 tokens/s  3:00 left",
        "step 30/100  loss 3.000  500 tokens/s  2:20 left  held-out 4.250 bits per byte",
        "step 100/100  loss 2.000  held-out 4.250 bits per byte",
    ]


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(progress, "terminal", Console(file=screen, force_terminal=True, width=160))
    with TrainingProgress(TRAINING) as show:
        for record in RECORDS:
            show(record)
    assert "100/100 loss 2.000  held-out 4.250" in Text.from_ansi(screen.getvalue()).plain


def test_bar_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(progress, "terminal", Console(file=screen, force_terminal=True, width=80))
    with TrainingProgress(TrainingConfig(steps=1000, batch_tokens=4096)) as show:
        show({"step": 200, "train/loss": 3.5, "train/tokens_per_second": 1234.5, "heldout/bits_per_byte": 3.9})
    (last,) = {line for line in Text.from_ansi(screen.getvalue()).plain.splitlines() if "200/1000" in line}
    assert len(last.strip()) <= 80
    bar, figures = last.strip().split(maxsplit=1)
    assert (len(bar), figures) == (12, "200/1000 loss 3.500  1,234 tokens/s  44:14 left  held-out 3.900")


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
