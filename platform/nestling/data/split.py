"""Which documents are held out: those whose hash falls into the lowest buckets."""

from __future__ import annotations

import hashlib

#: Documents fall into so many buckets by their hash.
BUCKETS = 10_000


def bucket(text: str) -> int:
    """Where a document's hash puts it, 0 to BUCKETS - 1; it is held out below the threshold."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) % BUCKETS


def threshold(heldout_percent: float) -> int:
    """The bucket from which documents are trained on."""
    return round(heldout_percent / 100 * BUCKETS)


def filling_both_sides(threshold: int, lowest: int, highest: int) -> int:
    """The threshold, moved to the nearest place where both sides of a source hold something.

    Args:
        threshold: the wanted one.
        lowest, highest: smallest and largest bucket of the source's documents; they must differ.
    """
    return min(max(threshold, lowest + 1), highest)
