"""What every source of a stream is: partitions of records that are found again by their offsets.

A partition only grows, and what stands at an offset never changes; so a bounded interval `[start, end)` of it is the
same text today and after a crash. Sources count offsets as they like (bytes, rows, messages). A record that cannot be
used is handed out as a `Broken` one in its place, never dropped and never an exception.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """The records of a partition from offset `start` to below `end`."""

    partition: str
    start: int
    end: int


@dataclass(frozen=True)
class Record:
    """A text and where it stands.

    Attributes:
        partition, offset, end: its place; the next record begins at `end`.
        text: what is learnt.
        key: what the source calls it.
        event_time: seconds since 1970, None where the source has none.
        domain: empty where the source has none.
        whole: whether it is a document by itself; if not, it goes on where the record before it ends.
    """

    partition: str
    offset: int
    end: int
    text: str
    key: str
    event_time: float | None = None
    domain: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, why, and SHA-256 of its bytes."""

    partition: str
    offset: int
    end: int
    reason: str
    sha256: str

    @classmethod
    def of(cls, partition: str, offset: int, end: int, reason: str, raw: bytes) -> Broken:
        return cls(partition, offset, end, reason, hashlib.sha256(raw).hexdigest())


class StreamSource(ABC):
    """Records in partitions. Sources travel to other processes, so they hold names and settings, no open handles."""

    #: As the person wrote it, without credentials.
    name: str

    @abstractmethod
    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        """Where each partition ends now, in the order in which they are to be read.

        Args:
            offsets: how far each partition has been planned.

        Raises:
            DataError: the source cannot be reached, or a partition has become shorter than it was.
        """

    @abstractmethod
    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        """The records of an interval.

        Raises:
            DataError: it is no longer there.
        """

    def ended(self, offsets: Mapping[str, int]) -> bool:
        """Whether nothing will ever follow these offsets."""
        return False

    def begins(self, partition: str) -> int:
        """Where a partition that was never read begins."""
        return 0

    def parts(self) -> Sequence[StreamSource]:
        """The sources that it is made of; no window holds records of two of them."""
        return (self,)

    def part(self, partition: str) -> StreamSource:
        """The one of `parts` that a partition belongs to."""
        return self

    def cut(self, interval: Interval, budget: int) -> tuple[int, int]:
        """The offset at which the text of an interval fills a budget of bytes, and the bytes up to there.

        It lies between two records, and after the first one, however large that is; it is the interval's start if there
        is not yet a whole record.
        """
        return filled(self.read(interval), interval.start, budget)


def filled(records: Iterable[Record | Broken], start: int, budget: int) -> tuple[int, int]:
    """See `StreamSource.cut`, of records that begin at `start`."""
    size, end = 0, start
    for record in records:
        end = record.end
        if isinstance(record, Record):
            size += len(record.text.encode("utf-8", "surrogatepass"))
        if size >= budget:
            break
    return end, size
