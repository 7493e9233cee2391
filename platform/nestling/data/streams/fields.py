"""From the bytes or fields of one record to a `Record` or a `Broken` one: one set of rules for all sources."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from nestling.data.streams.source import Broken, Record

_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Fields:
    """Which fields of a record mean what; None: records have no such thing.

    Attributes:
        text: field with the text.
        key, time, domain: fields with key, event time and domain.
        limit: largest record in bytes.
    """

    text: str = "text"
    key: str | None = None
    time: str | None = None
    domain: str | None = None
    limit: int = 1 << 20

    #: Share of control characters (line ends and tabs are none) from which on something is no text.
    CONTROL: ClassVar[float] = 0.05

    def of_line(self, partition: str, offset: int, raw: bytes) -> Record | Broken:
        """A line of a text file, with its newline."""
        end = offset + len(raw)
        if problem := self._raw_problem(raw):
            return Broken.of(partition, offset, end, problem, raw)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return Broken.of(partition, offset, end, f"no UTF-8 (byte {error.start} of the line)", raw)
        if len(_CONTROLS.findall(text)) > self.CONTROL * len(text):
            return Broken.of(partition, offset, end, "control characters: no text", raw)
        return Record(partition, offset, end, text, f"{partition}:{offset}", whole=False)

    def of_json(self, partition: str, offset: int, end: int, raw: bytes, **known: Any) -> Record | Broken:
        """A JSON object, or the plain text of a message where `known` says that it is one."""
        if problem := self._raw_problem(raw) or ("" if raw.strip() else "empty"):
            return Broken.of(partition, offset, end, problem, raw)
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Broken.of(partition, offset, end, f"no UTF-8 (byte {error.start})", raw)
        except (ValueError, RecursionError) as error:
            return Broken.of(partition, offset, end, f"no JSON: {error}", raw)
        if not isinstance(row, dict):
            return Broken.of(partition, offset, end, f"no JSON object but {type(row).__name__}", raw)
        return self.of_row(partition, offset, end, row, raw, **known)

    def of_row(
        self, partition: str, offset: int, end: int, row: Mapping[str, Any], raw: bytes, **known: Any
    ) -> Record | Broken:
        """Named fields; `known` is what the source says itself (`key`, `event_time`) where no field is named for it.

        Args:
            raw: the bytes that the hash of a broken record is made of.
        """

        def broken(reason: str) -> Broken:
            return Broken.of(partition, offset, end, reason, raw)

        text = row.get(self.text)
        if self.text not in row or not isinstance(text, str):
            return broken(f"no text in the field {self.text!r}")
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            return broken("no UTF-8: half a character")
        if not text.strip():
            return broken("empty")
        if len(_CONTROLS.findall(text)) > self.CONTROL * len(text):
            return broken("control characters: no text")
        if size > self.limit:
            return broken(f"oversized: {size} bytes, stream.record_bytes is {self.limit}")
        time: float | None = known.get("event_time")
        if self.time is not None:
            time = _seconds(row.get(self.time))
            if time is None:
                return broken(f"no event time in the field {self.time!r}")
        for field in (self.key, self.domain):
            if field is not None and row.get(field) in (None, ""):
                return broken(f"missing field {field!r}")
        key = str(row[self.key]) if self.key else known.get("key") or f"{partition}:{offset}"
        domain = str(row[self.domain]) if self.domain else known.get("domain", "")
        return Record(partition, offset, end, text, key, time, domain)

    def _raw_problem(self, raw: bytes) -> str:
        if len(raw) > self.limit:
            return f"oversized: {len(raw)} bytes, stream.record_bytes is {self.limit}"
        return "a NUL byte: no text" if b"\0" in raw else ""


def _seconds(value: Any) -> float | None:
    """An event time in seconds since 1970; a time without a zone is UTC's."""
    if isinstance(value, datetime):
        value = value.isoformat()
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return moment.timestamp() if moment.tzinfo else datetime.fromisoformat(f"{value}+00:00").timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
