"""`embedded:five-domains`: five kinds of text, one after another, that come with Python and the packages beside it.

english, unicode, cxx, js, python: far and near neighbours in turn. One partition, one pass, the domain with each
record. Within a domain records come in the order of a hash, so that nothing changes but the domain;
`embedded:five-domains-shuffled` is all of them in such an order, for controls: a stream in which nothing changes.
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
    records = [(domain, key, text) for domain in ORDER for key, text in sorted(_domain(domain), key=_by_hash)]
    return sorted(records, key=lambda record: _by_hash(record[1:])) if shuffled else records


def _domain(domain: str) -> Iterator[tuple[str, str]]:
    """Keys and pieces of documents, chosen by a hash of their number so that they stand for the whole."""
    documents = [(f"{domain}/{number}", text) for number, (_, text) in enumerate(DOMAINS[domain]())]
    size = 0
    for name, text in sorted(documents, key=_by_hash):
        for part, piece in enumerate(_pieces(text)):
            size += len(piece.encode("utf-8"))
            if size > DOMAIN_BYTES:
                return
            yield f"{name}/{part}", piece


def _by_hash(named: tuple[str, str]) -> bytes:
    return hashlib.sha256(named[0].encode()).digest()


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + RECORD_BYTES
        end = (text.rfind("\n", start, end) + 1 or end) if end < len(text) else len(text)
        if text[start:end].strip():
            yield text[start:end]
        start = end
