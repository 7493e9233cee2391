"""Several sources as one: each keeps its partitions, offsets and turns, under a name of its own.

The partition P of the source NAME is NAME/P in plans, ledger and positions, so whatever keeps books of one source keeps
them of several. A window holds records of one source only, so that all of it may write the same levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nestling.data.streams.source import Broken, Interval, Record, StreamSource


@dataclass(frozen=True)
class Part(StreamSource):
    """One of several sources.

    Attributes:
        name: what it is called: before its partitions, and as the domain of records that have none.
        source: what is read.
    """

    name: str
    source: StreamSource

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        return {f"{self.name}/{own}": end for own, end in self.source.ends(self._own(offsets)).items()}

    def ended(self, offsets: Mapping[str, int]) -> bool:
        return self.source.ended(self._own(offsets))

    def begins(self, partition: str) -> int:
        return self.source.begins(self._bare(partition))

    def cut(self, interval: Interval, budget: int) -> tuple[int, int]:
        return self.source.cut(replace(interval, partition=self._bare(interval.partition)), budget)

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        for record in self.source.read(replace(interval, partition=self._bare(interval.partition))):
            if isinstance(record, Record):
                yield replace(record, partition=interval.partition, domain=record.domain or self.name)
            else:
                yield replace(record, partition=interval.partition)

    def _bare(self, partition: str) -> str:
        return partition.removeprefix(f"{self.name}/")

    def _own(self, offsets: Mapping[str, int]) -> dict[str, int]:
        return {self._bare(name): offset for name, offset in offsets.items() if name.startswith(f"{self.name}/")}


@dataclass(frozen=True)
class Several(StreamSource):
    """Sources that take turns, window by window."""

    sources: tuple[Part, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return ", ".join(part.name for part in self.sources)

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        return {name: end for part in self.sources for name, end in part.ends(offsets).items()}

    def ended(self, offsets: Mapping[str, int]) -> bool:
        return all(part.ended(offsets) for part in self.sources)

    def begins(self, partition: str) -> int:
        return self.part(partition).begins(partition)

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        return self.part(interval.partition).read(interval)

    def parts(self) -> tuple[Part, ...]:
        return self.sources

    def part(self, partition: str) -> Part:
        name = partition.partition("/")[0]  # which has no slash in it
        return next(part for part in self.sources if part.name == name)
