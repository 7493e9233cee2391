"""A stream made by a Python function: for tests and simulations."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.data.errors import DataError
from nestling.data.streams.fields import Fields
from nestling.data.streams.source import Broken, Interval, Record, StreamSource, filled

#: Records of a stream without end that are offered at once.
_AHEAD = 1 << 20


@dataclass(frozen=True)
class Generator(StreamSource):
    """`python:MODULE:FUNCTION`: the function takes an offset, counted from 0, and returns the record that stands there.

    A record is a text, or a mapping with the fields of a JSON record. None says that there is nothing yet,
    StopIteration that the stream has ended. The same offset must always give the same record.
    """

    name: str
    fields: Fields

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        offset = offsets.get(self.name, 0)
        return {self.name: offset if self._at(offset) is None else offset + _AHEAD}

    def ended(self, offsets: Mapping[str, int]) -> bool:
        try:
            self._function()(offsets.get(self.name, 0))
        except StopIteration:
            return True
        return False

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        offset = interval.start
        for record in self._there(interval):
            offset = record.end
            yield record
        if offset < interval.end:
            raise DataError(f"{self.name}: gives nothing at offset {offset}, where there was a record before")

    def cut(self, interval: Interval, budget: int) -> tuple[int, int]:
        return filled(self._there(interval), interval.start, budget)

    def _there(self, interval: Interval) -> Iterator[Record | Broken]:
        """The records of an interval up to the first that is not there yet."""
        for offset in range(interval.start, interval.end):
            content = self._at(offset)
            if content is None:
                return
            row = {self.fields.text: content} if isinstance(content, str) else content
            raw = json.dumps(row, sort_keys=True, default=str).encode()
            yield self.fields.of_row(interval.partition, offset, offset + 1, row, raw)

    def _at(self, offset: int) -> str | Mapping[str, Any] | None:
        try:
            content: str | Mapping[str, Any] | None = self._function()(offset)
        except StopIteration:
            return None
        return content

    def _function(self) -> Callable[[int], Any]:
        module, _, function = self.name.removeprefix("python:").partition(":")
        try:
            found: Callable[[int], Any] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self.name}: {error}; needs python:MODULE:FUNCTION with a module that the workers can import"
            ) from error
        return found
