"""The ledger of a stream: one JSON line for each interval that was trained on, each naming the hash of the one before.

A snapshot holds how long the ledger was and its last hash, so that the rename that commits the weights commits the
lines that led to them. Whatever stands behind that is of a history that a crash has ended, and is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: More bytes than a line has.
_LONGEST = 1 << 20


class Lines:
    """A file of JSON lines that grows, and goes back with the snapshot to where it was.

    Args:
        path: the file; what it holds is kept until `rewind`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.bytes = path.stat().st_size

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines so that they last."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with self.path.open("r+b") as file:
            file.truncate(self.bytes)  # what an earlier attempt has left when the disk was full
            file.seek(self.bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.bytes += len(text)

    def rewind(self, size: int) -> None:
        """Go back to where the file had so many bytes."""
        if size > self.path.stat().st_size:
            raise ValueError(f"{self.path} has {self.path.stat().st_size} bytes, the snapshot knows {size}")
        with self.path.open("r+b") as file:
            file.truncate(size)
        self.bytes = size


class Ledger(Lines):
    """The lines of a ledger with their chain of hashes.

    Attributes:
        last: hash of the last line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.last = ""

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        chained, last = [], self.last
        for line in lines:
            chained.append({**line, "previous": last})
            last = _digest(json.dumps(chained[-1]))
        super().append(chained)
        self.last = last

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"bytes": self.bytes, "last": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state; ValueError if the ledger does not hold it."""
        with self.path.open("rb") as file:
            file.seek(max(0, state["bytes"] - _LONGEST))
            lines = file.read(min(_LONGEST, state["bytes"])).splitlines()
        if lines and _digest(lines[-1].decode("utf-8", "replace")) != state["last"]:
            raise ValueError(f"{self.path}: the line that the snapshot names last is another one")
        self.rewind(state["bytes"])
        self.last = state["last"]


@dataclass
class Verified:
    """What a ledger proves.

    Attributes:
        intervals, gaps, overlaps: how many there are.
        records, dead, late: what was in them.
        problems: everything that is wrong, in words.
    """

    intervals: int = 0
    gaps: int = 0
    overlaps: int = 0
    records: int = 0
    dead: int = 0
    late: int = 0
    problems: list[str] | None = None

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    path: Path,
    state: Mapping[str, Any] | None,
    begin: Callable[[str], int | None] = lambda partition: None,
    position: Mapping[str, Any] | None = None,
) -> Verified:
    """Go through a ledger: every partition's intervals abut, windows and steps only rise, no line was altered.

    Args:
        path: the ledger.
        state: what the newest snapshot says of it (`Ledger.state`), None if there is none. Lines behind it do not
            count.
        begin: where a partition begins; None: wherever its first interval does.
        position: where the snapshot says that the stream stands: the next `window`, and the `offsets` of partitions.
    """
    found, problems = Verified(), []
    ends, last, window, step = dict[str, int](), "", -1, 0
    for number, text in enumerate(_committed(path, state), 1):
        try:
            line = json.loads(text)
            place = f"line {number} (window {line['window_id']}, partition {line['partition']})"
            start, end, before = line["start"], line["end"], line["previous"]
            counts = [line[name] for name in ("n_records", "n_dead", "n_late")]
            follows = line["window_id"] in (window, window + 1) and line["step"] >= step
            window, step = line["window_id"], line["step"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number} cannot be read: {type(error).__name__} {error}")
            continue
        if before != last:
            problems.append(f"{place}: the line before it was altered, left out or put in")
        last = _digest(text)
        known = ends.get(line["partition"], begin(line["partition"]))
        expected = start if known is None else known
        if start > expected:
            found.gaps += 1
            problems.append(f"{place}: begins at {start}, but the one before ended at {expected}: a gap")
        if start < expected or end < start:
            found.overlaps += 1
            problems.append(f"{place}: begins at {start}, but the one before ended at {expected}: an overlap")
        if not follows:
            problems.append(f"{place}: does not follow the window and the step before it")
        ends[line["partition"]] = end
        found.intervals += 1
        found.records, found.dead, found.late = (
            sum(pair) for pair in zip((found.records, found.dead, found.late), counts, strict=True)
        )
    if position is not None and (position["window"] != window + 1 or ends != position["offsets"]):
        problems.append("the ledger does not end where the newest snapshot says that the stream stands")
    if state is not None and last != state["last"]:
        problems.append("the ledger does not end with the line that the newest snapshot names")
    found.problems = problems
    return found


def _committed(path: Path, state: Mapping[str, Any] | None) -> Iterator[str]:
    """The lines up to where the snapshot says, without their newlines."""
    left = 0 if state is None else state["bytes"]
    with path.open("rb") as file:
        while left > 0 and (raw := file.readline()):
            left -= len(raw)
            yield raw.decode("utf-8", "replace").rstrip("\n")
    if left:
        yield f"(ends {'before' if left > 0 else 'behind'} what the newest snapshot names)"


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
