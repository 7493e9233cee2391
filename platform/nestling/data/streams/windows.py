"""Which records make which window: written down before anything is read, so that a crash cannot change it.

Every planned window is a small file in `windows/` of the run's folder, and that folder is all that planner and readers
share. A window that was planned stays as it is, whatever arrives meanwhile; the planner goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.config.stream import StreamConfig
from nestling.data.errors import DataError
from nestling.data.streams.source import Interval, StreamSource

_PAUSE = 0.02  # seconds between two looks for the next window's file


class StreamEnded(DataError):
    """No window follows because the source cannot go on; the message says why."""


@dataclass(frozen=True)
class Plan:
    """A window's number and the intervals that it is read from, in their order."""

    number: int
    intervals: tuple[Interval, ...]


@dataclass
class Position:
    """Where a stream stands: what the next window is, and what has come before it.

    Attributes:
        window: number of the next window.
        offsets: where each partition goes on.
        latest: the latest event time so far.
    """

    window: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    latest: float | None = None


class WindowFolder:
    """The planned windows of a run, `windows/00000012.json`, and the end of the stream, `windows/end.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self) -> None:
        """Take the mark of an end away that a stopped or finished run has left."""
        self._folder.mkdir(exist_ok=True)
        self._end.unlink(missing_ok=True)

    def plan(self, number: int) -> Plan | None:
        """A window, None as long as it is not planned."""
        try:
            content = json.loads(self._file(number).read_text())
        except FileNotFoundError:
            return None
        return Plan(number, tuple(Interval(**interval) for interval in content["intervals"]))

    def write(self, plan: Plan) -> None:
        self._replace(self._file(plan.number), {"intervals": [asdict(interval) for interval in plan.intervals]})

    def end(self, window: int, error: str = "") -> None:
        """Say that `window` will not come: the stream has ended or is to stop, or it cannot go on for a reason."""
        self._replace(self._end, {"window": window, "error": error})

    def ended(self, window: int) -> str | None:
        """Why there will be no such window, empty for an ordinary end; None as long as it may still come."""
        try:
            content = json.loads(self._end.read_text())
        except FileNotFoundError:
            return None
        return content["error"] if window >= content["window"] else None

    def wait(self, number: int) -> Plan | None:
        """The window as soon as it is planned; None if the stream ends before it, StreamEnded if it cannot go on."""
        while (plan := self.plan(number)) is None:
            error = self.ended(number)
            if error:
                raise StreamEnded(error)
            if error is not None:
                return None
            time.sleep(_PAUSE)
        return plan

    def forget(self, before: int) -> None:
        """Remove the windows before this one, which no snapshot needs any more."""
        for path in self._folder.glob("[0-9]*.json"):
            if int(path.stem) < before:
                path.unlink(missing_ok=True)

    @property
    def _end(self) -> Path:
        return self._folder / "end.json"

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08}.json"

    def _replace(self, path: Path, content: dict[str, Any]) -> None:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(content))
        draft.replace(path)


class Arrivals:
    """What a source holds beyond what was planned, in the order in which it came.

    What a look finds in partitions at the same time is taken in their order; what later looks find comes behind it, so
    that a partition that grows without end does not keep others waiting.
    """

    def __init__(self, source: StreamSource, offsets: dict[str, int]) -> None:
        self.source, self.offsets = source, dict(offsets)
        self._seen = dict(offsets)
        self._queue: deque[tuple[str, int]] = deque()

    def look(self) -> None:
        for partition, end in self.source.ends(self.offsets).items():
            if partition not in self.offsets:
                self.offsets[partition] = self._seen[partition] = self.source.begins(partition)
            if end > self._seen[partition]:
                self._seen[partition] = end
                self._queue.append((partition, end))

    def take(self, budget: int) -> tuple[list[Interval], int]:
        """Intervals with text of about `budget` bytes, less if there is not so much, and their bytes."""
        intervals: list[Interval] = []
        size = 0
        while self._queue and size < budget:
            partition, upto = self._queue[0]
            start = self.offsets[partition]
            end, taken = self.source.cut(Interval(partition, start, upto), budget - size)
            if end > start:
                intervals.append(Interval(partition, start, end))
            size += taken
            self.offsets[partition] = end
            if end >= upto or end == start:
                self._queue.popleft()
                self._seen[partition] = max(end, upto if end > start else end)
        return _joined(intervals), size

    def give_back(self, intervals: list[Interval]) -> None:
        """Undo a `take`: the window is not closed yet."""
        for interval in reversed(intervals):
            self.offsets[interval.partition] = interval.start
            self._queue.appendleft((interval.partition, max(interval.end, self._seen[interval.partition])))

    def ended(self) -> bool:
        return not self._queue and self.source.ended(self.offsets)


class Planner:
    """Plans windows, never more than `windows_ahead` beyond the one that is trained on.

    Args:
        source: what is read.
        folder: where windows are written down; those that are there are kept.
        config: sizes and times.
        position: where to begin.
    """

    def __init__(self, source: StreamSource, folder: WindowFolder, config: StreamConfig, position: Position) -> None:
        self._folder, self._config = folder, config
        self._next = position.window
        offsets = dict(position.offsets)
        while (plan := folder.plan(self._next)) is not None:
            offsets |= {interval.partition: interval.end for interval in plan.intervals}
            self._next += 1
        self._arrivals = Arrivals(source, offsets)
        #: The window that is trained on, or the next one; the training moves it on.
        self.consumed = position.window

    def run(self, stopping: Callable[[], bool]) -> None:
        """Plan until the stream ends or `stopping` says so; whatever goes wrong ends the stream with its reason."""
        try:
            for plan in self._plans(stopping):
                self._folder.write(plan)
            self._folder.end(self._next)
        except Exception as error:
            text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            self._folder.end(self._next, text)

    def _plans(self, stopping: Callable[[], bool]) -> Iterator[Plan]:
        opened: float | None = None
        while not stopping():
            if self._next > self.consumed + self._config.windows_ahead:
                time.sleep(_PAUSE)
                continue
            self._arrivals.look()
            intervals, size = self._arrivals.take(self._config.window_bytes)
            ended, now = self._arrivals.ended(), time.monotonic()
            if intervals and opened is None:
                opened = now
            full = size >= self._config.window_bytes
            if intervals and (full or ended or now - (opened or now) >= self._config.close_after):
                yield Plan(self._next, tuple(intervals))
                self._next, opened = self._next + 1, None
            elif ended:
                return
            else:
                self._arrivals.give_back(intervals)
                time.sleep(self._config.poll_every)


def _joined(intervals: list[Interval]) -> list[Interval]:
    """Neighbouring intervals of one partition as one."""
    joined: list[Interval] = []
    for interval in intervals:
        if joined and joined[-1].partition == interval.partition and joined[-1].end == interval.start:
            joined[-1] = Interval(interval.partition, joined[-1].start, interval.end)
        else:
            joined.append(interval)
    return joined
