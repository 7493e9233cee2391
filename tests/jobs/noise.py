"""A stream of English, then C++, clean and with random bytes between: records of 500 bytes, 40 of them a window."""

from __future__ import annotations

import random
from functools import cache

from nestling.data.streams.five_domains import _records

# Random bytes, each as the character with its number, but for control characters: those make a broken record.
LATIN = [chr(byte) for byte in (*range(32, 127), *range(160, 256))]


@cache
def records(noisy: bool) -> list[dict[str, str]]:
    pieces: dict[str, list[dict[str, str]]] = {"english": [], "cxx": []}
    for domain, _, text in _records(False):
        if domain in pieces and text.isascii():
            parts = (text[end - 500 : end] for end in range(500, len(text) + 1, 500))
            pieces[domain] += [{"text": part, "domain": domain} for part in parts]
    clean = pieces["english"][:160] + pieces["cxx"][:40]
    return [*clean[:120], *map(noise, range(40)), *clean[120:]] if noisy else clean


def noise(number: int) -> dict[str, str]:
    raw = "".join(random.Random(number).choices(LATIN, k=500)).encode()[:500].decode(errors="ignore")
    return {"text": raw + "~" * (500 - len(raw.encode())), "domain": "noise"}


def at(offset: int, noisy: bool) -> dict[str, str]:
    if offset >= len(records(noisy)):
        raise StopIteration
    return records(noisy)[offset]


def of_clean(offset: int) -> dict[str, str]:
    return at(offset, noisy=False)


def of_noisy(offset: int) -> dict[str, str]:
    return at(offset, noisy=True)
