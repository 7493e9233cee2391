"""Which records make which window: written down before anything is read, so that a crash cannot change it.

Every planned window is a small file in `windows/` of the run's folder, and that folder is all that planner and readers
share. A window that was planned stays as it is, whatever arrives meanwhile; the planner goes on behind it.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.config.stream import StreamConfig
from nestling.data.errors import DataError
from nestling.data.streams.source import Interval, StreamSource

_RETRIES = (1.0, 2.0, 4.0)  # seconds before a source that does not answer is asked again
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
        latest: of each source the latest event time so far.
    """

    window: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)


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
            return Plan(number, tuple(Interval(**interval) for interval in content["intervals"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._file(number)} is damaged: {error}; put it back") from error

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
            if self.plan(number + 1) is not None and self.plan(number) is None:
                raise DataError(f"{self._file(number)} is gone, though the window after it is planned; put it back")
            time.sleep(_PAUSE)
        return plan

    def forget(self, before: int = 0, after: int | None = None) -> None:
        """Remove the windows before one, which no snapshot needs any more, or `after` one, to be planned anew."""
        for path in self._folder.glob("[0-9]*.json"):
            if int(path.stem) < before or (after is not None and int(path.stem) > after):
                path.unlink(missing_ok=True)

    @property
    def _end(self) -> Path:
        return self._folder / "end.json"

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08}.json"

    def _replace(self, path: Path, content: dict[str, Any]) -> None:
        draft = path.with_suffix(".tmp")
        with draft.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Arrivals:
    """What one source holds beyond what was planned, in the order in which it came.

    What a look finds in partitions at the same time is taken in their order; what later looks find comes behind it, so
    that a partition that grows without end does not keep others waiting. Of each partition two ends are remembered at
    most: the one whose turn comes first, and the newest.

    Attributes:
        offsets: how far each partition is planned.
        ends: where each partition ended when it was last looked at.
        begins: where each partition begins that was not in `offsets`.
    """

    def __init__(self, source: StreamSource, offsets: dict[str, int]) -> None:
        self.source, self.offsets = source, dict(offsets)
        self.ends: Mapping[str, int] = {}
        self.begins: dict[str, int] = {}
        #: Since when there has been something that is in no window.
        self.since: float | None = None
        self._queue: deque[str] = deque()
        self._ends: dict[str, list[int]] = {}

    def look(self) -> None:
        """See what has come."""
        found = self.source.ends(self.offsets)
        for partition, end in found.items():
            if partition not in self.offsets:
                self.offsets[partition] = self.begins[partition] = self.source.begins(partition)
            ends = self._ends.setdefault(partition, [])
            if end <= max(ends, default=self.offsets[partition]):
                continue
            if len(ends) < 2:
                ends.append(end)
                self._queue.append(partition)
            else:
                ends[1] = end
        self.ends = found

    def propose(self, budget: int) -> tuple[list[Interval], int]:
        """Intervals with text of about `budget` bytes, less if there is not so much, and their bytes."""
        intervals: list[Interval] = []
        size, moved = 0, dict[str, int]()
        taken_turns: dict[str, int] = {}
        for partition in self._queue:
            if size >= budget:
                break
            turn = taken_turns.get(partition, 0)
            taken_turns[partition] = turn + 1
            start, upto = moved.get(partition, self.offsets[partition]), self._ends[partition][turn]
            end, taken = self.source.cut(Interval(partition, start, upto), budget - size)
            if end > start:
                intervals.append(Interval(partition, start, end))
            size += taken
            moved[partition] = end
        return _joined(intervals), size

    def accept(self, intervals: list[Interval]) -> None:
        """The intervals have become a window."""
        self.since = None
        for interval in intervals:
            self.offsets[interval.partition] = interval.end
        passed = {p: sum(end <= self.offsets[p] for end in ends) for p, ends in self._ends.items()}
        kept: deque[str] = deque()
        for partition in self._queue:
            if passed[partition]:
                passed[partition] -= 1
                self._ends[partition].pop(0)
            else:
                kept.append(partition)
        self._queue = kept

    def ended_after(self, intervals: list[Interval]) -> bool:
        """Whether nothing will follow once these are taken."""
        return self.source.ended(self.offsets | {interval.partition: interval.end for interval in intervals})


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
        folder.forget(after=self._next)  # what stands behind a gap belongs to a history that is gone
        self._arrivals = [Arrivals(part, offsets) for part in source.parts()]
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
            self._end(text)

    def lag(self, offsets: Mapping[str, int]) -> dict[str, int]:
        """How far each partition reached beyond these offsets at the last look, in the source's own units."""
        return {
            name: end - offsets.get(name, arrivals.begins.get(name, 0))
            for arrivals in self._arrivals
            for name, end in arrivals.ends.items()
        }

    def _end(self, error: str) -> None:
        """Write down that the stream cannot go on; a disk that is full may take that later."""
        while True:
            try:
                self._folder.end(self._next, error)
                return
            except OSError:
                time.sleep(_RETRIES[-1])

    def _look(self, arrivals: Arrivals) -> tuple[list[Interval], int]:
        """What could be the next window; a source that does not answer is asked again before that is the end."""
        for pause in (*_RETRIES, None):
            try:
                arrivals.look()
                return arrivals.propose(self._config.window_bytes)
            except DataError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError

    def _window(self, arrivals: Arrivals) -> tuple[list[Interval], bool]:
        """A source's next window, empty as long as it may fill up or there is none; and whether nothing follows it."""
        intervals, size = self._look(arrivals)
        ended, now = arrivals.ended_after(intervals), time.monotonic()
        if intervals and arrivals.since is None:
            arrivals.since = now
        full = size >= self._config.window_bytes
        closed = full or ended or now - (arrivals.since or now) >= self._config.close_after
        return intervals if closed else [], ended

    def _plans(self, stopping: Callable[[], bool]) -> Iterator[Plan]:
        while not stopping():
            if self._next > self.consumed + self._config.windows_ahead:
                time.sleep(_PAUSE)
                continue
            # Whose turn it is follows from the window's number, so a stream that goes on need remember nothing.
            turn = self._next % len(self._arrivals)
            over = True
            for arrivals in (*self._arrivals[turn:], *self._arrivals[:turn]):
                intervals, ended = self._window(arrivals)
                if intervals:
                    yield Plan(self._next, tuple(intervals))
                    arrivals.accept(intervals)
                    self._next += 1
                    break
                over &= ended
            else:
                if over:
                    return
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
