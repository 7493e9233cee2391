"""How far a sweep is: a table of its trials on a terminal, a line for each trial that ended anywhere else."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

from nestling.jobs.output import say, terminal
from nestling.tracking.runs import RunFolder

if TYPE_CHECKING:
    from nestling.tuning.sweeps.outcome import Outcome
    from nestling.tuning.sweeps.plan import Plan

#: Seconds from one look at the running trials to the next.
INTERVAL = 2.0
#: Trials that the table shows, the last ones.
ROWS = 20


class TrialsProgress:
    """Shows the trials of a sweep; call it with each that has ended. It is a context manager."""

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self._plan, self._folder = plan, folder
        self._objective = plan.sweep.objectives[0].metric
        self._ended = 0
        self._live: Live | None = None
        self._closed = threading.Event()

    def __enter__(self) -> TrialsProgress:
        from nestling.tuning.sweeps.outcome import Lines

        self._ended = len(Lines(self._folder).outcomes())
        if terminal.is_terminal:
            self._live = Live(
                self._table(), console=terminal, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
            self._thread = threading.Thread(target=self._watch, name="nestling-trials", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._closed.set()
            self._thread.join()
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def __call__(self, outcome: Outcome) -> None:
        self._ended += 1
        if self._live is None:
            value = outcome.objectives.get(self._objective)
            found = f"failed: {outcome.error}" if outcome.state == "failed" else f"{self._objective} {_number(value)}"
            how = f"{outcome.cost.get('tokens', 0):,} tokens, {outcome.state}"
            say(
                f"{self._ended}/{self._plan.trials}  {outcome.arm}, seed {outcome.seed}: {found}, {how}",
                "red" if outcome.state == "failed" else None,
            )

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL):
            if self._live is not None:
                self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        from nestling.tuning.sweeps.outcome import LOGGED, Lines, trial_folders

        title = f"{self._ended} of {self._plan.trials} trials have ended"
        if self._folder.stop.exists():
            title += "; saving the others, then stopping (Ctrl-C again: at once)"
        table = Table(box=None, pad_edge=False, title=title)
        for heading in ("arm", "seed", "state", "tokens", self._objective):
            table.add_column(heading, justify="left" if heading in ("arm", "state") else "right")
        outcomes = Lines(self._folder).outcomes()
        runs = trial_folders(self._folder.path.parent.parent, self._folder.run_id)
        for (arm, seed), run in list(runs.items())[-ROWS:]:
            outcome, last = outcomes.get((arm, seed)), run.last_values()
            value = last.get(LOGGED.get(self._objective, ""))
            state = run.status()
            if outcome is not None:
                state, value = outcome.state, outcome.objectives.get(self._objective, value)
            tokens = f"{int(last.get('train/tokens', 0)):,}"
            style = "red" if state == "failed" else "dim" if outcome is not None else None
            table.add_row(arm, str(seed), state, tokens, _number(value), style=style)
        return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
