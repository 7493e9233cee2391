"""`embedded:five-domains`: five kinds of text, one after another, that come with Python and the packages beside it.

english, unicode, cxx, js, python: far and near neighbours in turn. One partition, one pass, the domain with each
record; `embedded:five-domains-shuffled` is the same records in a seeded order, for controls: a stream in which nothing
changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from nestling.data.embedded import DOMAINS
from nestling.data.streams.source import Broken, Interval, Record, StreamSource

NAME, SHUFFLED = "embedded:five-domains", "embedded:five-domains-shuffled"
ORDER = ("english", "unicode", "cxx", "js", "python")
#: Bytes of text of each domain, and the length at which documents are cut at a line's end into records.
DOMAIN_BYTES, RECORD_BYTES = 330_000, 2048


@dataclass(frozen=True)
class FiveDomains(StreamSource):
    """The stream, in its order or shuffled (`name`)."""

    name: str = NAME

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        return {"0": len(_records(self.name == SHUFFLED))}

    def ended(self, offsets: Mapping[str, int]) -> bool:
        return offsets.get("0", 0) >= len(_records(self.name == SHUFFLED))

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        records = _records(self.name == SHUFFLED)
        for offset in range(interval.start, interval.end):
            domain, key, text = records[offset]
            yield Record(interval.partition, offset, offset + 1, text, key, None, domain)


@lru_cache(maxsize=2)
def _records(shuffled: bool) -> list[tuple[str, str, str]]:
    """Domain, key and text of every record."""
    records = [(domain, key, text) for domain in ORDER for key, text in _domain(domain)]
    if shuffled:
        records.sort(key=lambda record: hashlib.sha256(record[1].encode()).digest())
    return records


def _domain(domain: str) -> Iterator[tuple[str, str]]:
    """Pieces of documents, these in the order of a hash of their number, so that the start stands for the whole."""
    documents = sorted(enumerate(text for _, text in DOMAINS[domain]()), key=lambda pair: _place(domain, pair[0]))
    size = 0
    for number, text in documents:
        for part, piece in enumerate(_pieces(text)):
            size += len(piece.encode("utf-8"))
            if size > DOMAIN_BYTES:
                return
            yield f"{domain}/{number}/{part}", piece


def _place(domain: str, number: int) -> bytes:
    return hashlib.sha256(f"{domain} {number}".encode()).digest()


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + RECORD_BYTES
        end = (text.rfind("\n", start, end) + 1 or end) if end < len(text) else len(text)
        if text[start:end].strip():
            yield text[start:end]
        start = end
