"""How far a training is: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from nestling.config import TrainingConfig
from nestling.jobs.output import say, terminal

#: Seconds between two lines where there is no terminal.
INTERVAL = 5.0
_STARTING = "starting Ray, preparing data"


class TrainingProgress:
    """Shows the records of a training as they come; call it with each of them.

    The bar is open while it is used as a context manager.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._heldout = ""
        self._last_line = float("-inf")
        self._bar: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        if terminal.is_terminal:
            self._bar = Progress(
                BarColumn(12),
                MofNCompleteColumn(),
                # What is left of a narrow terminal, so that bar and count stay whole.
                TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                expand=True,
                console=terminal,
                # Left alone, rich would bring back to the terminal what others print.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(_STARTING, total=self._training.steps)
            self._bar.start()
        else:
            say(_STARTING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Takes one record of log.jsonl: `step` and any of the metrics."""
        step, steps = int(record["step"]), self._training.steps
        heldout = record.get("heldout/bits_per_byte")
        if heldout is not None:
            self._heldout = f"held-out {heldout:.3f}"
        figures = "  ".join(filter(None, (*self._figures(record, step), self._heldout)))
        if self._bar is not None:
            self._bar.update(self._task, description=figures, completed=step)
        elif heldout is not None or step == steps or time.monotonic() - self._last_line >= INTERVAL:
            self._last_line = time.monotonic()
            unit = " bits per byte" if self._heldout else ""
            say(f"step {step}{f'/{steps}' if steps else ''}  {figures}{unit}")

    def event(self, event: dict[str, Any]) -> None:
        """Takes one event of the run; those that a person need not know are left to events.jsonl."""
        if event["kind"] != "checkpoint":
            say(event["message"])

    def _figures(self, record: dict[str, Any], step: int) -> list[str]:
        figures = []
        if (bits := record.get("prequential/bits_per_byte")) is not None:
            figures.append(f"prequential {bits:.3f} b/B")
        elif (loss := record.get("train/loss")) is not None:
            figures.append(f"loss {loss:.3f}")
        if speed := record.get("train/tokens_per_second"):
            figures.append(f"{speed:,.0f} tokens/s")
            if self._training.steps is not None:
                left = (self._training.steps - step) * self._training.batch_tokens / speed
                figures.append(f"{duration(left)} left")
        return figures


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
