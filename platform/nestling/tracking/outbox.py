"""What a run has for MLflow and MLflow has not got yet, on disk and in order.

`mlflow/queue.jsonl` in the run's folder has one entry a line, `mlflow/position.json` says how far it was delivered and
which row of each metric was the last. Both survive a kill at any moment: at worst entries are delivered twice, which
MLflow's rows do not show, because an entry carries its time. Nothing waits in memory, so MLflow may be away for weeks.
One process at a time has the outbox of a run; a lock sees to it.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from nestling.tracking.files import append_whole, cut_half_line, draft_json, locked, read_json, replace_json

Entry = dict[str, Any]

_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in the name of a metric
_NAME_LIMIT = 250  # characters of such a name
_COMPACT = 1_000_000  # bytes delivered before the queue is emptied


class Row(NamedTuple):
    """One value of a metric as MLflow has it; `time` in milliseconds."""

    step: int
    time: int
    value: float


class Outbox:
    """The outbox of one run, held until it is closed.

    A step of a metric is taken once: what a resumed run computes again is left out, whatever became of the log.

    Args:
        place: the folder of its files, made when needed.
        patience: seconds to wait for another process that has it.

    Attributes:
        last: the last delivered row of each metric.

    Raises:
        Locked: another process has it.
    """

    def __init__(self, place: Path, patience: float) -> None:
        self._open = ExitStack()
        self._open.enter_context(locked(place / "lock", patience))
        self._guard = threading.Lock()
        self._state = place / "position.json"
        queue = place / "queue.jsonl"
        cut_half_line(queue)
        self._writer = self._open.enter_context(queue.open("ab", buffering=0))
        self._reader = self._open.enter_context(queue.open("rb"))
        state = read_json(self._state)
        self._offset: int = state.get("offset", 0)
        if self._offset > self._size():  # killed between the two steps of `_compact`
            self._offset = 0
        self._time: int = state.get("time", 0)
        self.last = {key: Row(*row) for key, row in state.get("last", {}).items()}
        self._queued = {key: row.step for key, row in self.last.items()}
        self._take_up()

    def put_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step that are later than what was taken of them before."""
        with self._guard:
            fresh = {key: value for key, value in _named(metrics).items() if step > self._queued.get(key, -1)}
            if fresh:
                self._append({"metrics": fresh, "step": step})

    def put_checkpoint(self, step: int, location: str, metrics: Mapping[str, float]) -> None:
        """Take a checkpoint of `step` at `location` (a URI), with the metrics of its model."""
        with self._guard:
            self._append({"checkpoint": location, "step": step, "metrics": _named(metrics)})

    def put_forgotten(self, step: int) -> None:
        """Take that the checkpoint of `step` is no more."""
        with self._guard:
            self._append({"forget": step})

    @property
    def empty(self) -> bool:
        """Whether everything was delivered."""
        return self._offset == self._size()

    def next(self, limit: int) -> tuple[list[Entry], int]:
        """The next entries, in order, and the offset behind them for `done`.

        Returns:
            Entries with metrics only, up to about `limit` rows, or one entry of another kind; none when all are
            delivered.
        """
        self._reader.seek(self._offset)
        entries: list[Entry] = []
        end, rows = self._offset, 0
        while rows < limit and (line := self._reader.readline()).endswith(b"\n"):
            entry: Entry = json.loads(line)
            only = "checkpoint" in entry or "forget" in entry
            if only and entries:
                break
            entries.append(entry)
            end += len(line)
            rows += len(entry.get("metrics", ()))
            if only:
                break
        return entries, end

    def done(self, end: int, rows: Mapping[str, Row]) -> None:
        """Note that MLflow has everything up to `end`; `rows` are the last ones of it."""
        self._offset = end
        self.last.update(rows)
        replace_json(self._state, self._position(end))
        if end > _COMPACT and self.empty:
            self._compact()

    def close(self) -> None:
        """Leave the outbox to another process."""
        self._open.close()

    def _append(self, entry: Entry) -> None:
        """Write an entry with its time, later than that of any before: MLflow orders the history of a metric by it."""
        self._time = max(time.time_ns() // 1_000_000, self._time + 1)
        append_whole(self._writer, json.dumps(entry | {"time": self._time}).encode() + b"\n")
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        for key in entry.get("metrics", ()):
            self._queued[key] = max(entry["step"], self._queued.get(key, -1))

    def _take_up(self) -> None:
        """Find out what an earlier process left, line by line: it may be more than fits into memory."""
        self._reader.seek(self._offset)
        for line in self._reader:
            entry = json.loads(line)
            self._time = max(self._time, entry["time"])
            self._note(entry)

    def _compact(self) -> None:
        """Empty the file, unless something was put meanwhile; the training does not wait for the disk here."""
        draft = draft_json(self._state, self._position(0))
        with self._guard:
            if self.empty:
                os.ftruncate(self._writer.fileno(), 0)
                draft.replace(self._state)
                self._offset = 0

    def _position(self, offset: int) -> dict[str, Any]:
        return {"offset": offset, "time": self._time, "last": self.last}

    def _size(self) -> int:
        return os.fstat(self._writer.fileno()).st_size


def is_waiting(place: Path) -> bool:
    """Whether the outbox at `place` has something for MLflow; takes no lock."""
    queue = place / "queue.jsonl"
    return queue.exists() and queue.stat().st_size != read_json(place / "position.json").get("offset", 0)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Plain numbers under names that MLflow takes."""
    return {_FORBIDDEN.sub("_", key)[:_NAME_LIMIT]: float(value) for key, value in metrics.items()}
