"""Two sources of a stream that is guarded: English and then C++, with and without a window of random bytes.

Named as `python:tests.jobs.garbage:clean` and `:noisy`. Records have 500 bytes, 40 a window.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from nestling.data.streams.five_domains import _records

SIZE = 500
# Random bytes, each as the character with its number, but for control characters: those make a broken record.
LATIN = [chr(byte) for byte in (*range(32, 127), *range(160, 256))]


def clean(offset: int) -> dict[str, Any]:
    return _record(_good(), offset)


def noisy(offset: int) -> dict[str, Any]:
    good = _good()
    return _record([*good[:120], *((_noise(number), "noise") for number in range(40)), *good[120:]], offset)


def _record(records: list[tuple[str, str]], offset: int) -> dict[str, Any]:
    if offset >= len(records):
        raise StopIteration
    text, domain = records[offset]
    return {"text": text, "domain": domain}


@cache
def _good() -> list[tuple[str, str]]:
    pieces: dict[str, list[tuple[str, str]]] = {"english": [], "cxx": []}
    for domain, _, text in _records(False):
        if domain in pieces and text.isascii():
            pieces[domain] += [(text[end - SIZE : end], domain) for end in range(SIZE, len(text) + 1, SIZE)]
    return pieces["english"][:160] + pieces["cxx"][:40]


def _noise(number: int) -> str:
    raw = "".join(random.Random(number).choices(LATIN, k=SIZE)).encode()[:SIZE].decode(errors="ignore")
    return raw + "~" * (SIZE - len(raw.encode()))
