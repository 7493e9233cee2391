"""Orders that need no memory: a seeded permutation of any number of places, and the dealing of a mix.

Both answer "what stands at place i?" by arithmetic alone, so a training run can start at any batch and no worker keeps
a list. The permutation is a Feistel network over the smallest power of four that holds all places; what falls outside
is sent through again (cycle walking: fewer than four passes on average). It shuffles well; it is no cryptography.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from nestling.data.errors import DataError

#: Sequences in which every part of a mix gets exactly its share.
BLOCK = 1024
_ROUNDS = 6


def permuted(places: np.ndarray, count: int, key: str) -> np.ndarray:
    """What a permutation of 0 to `count` - 1, chosen by `key`, has at these places; int64 of the same shape."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, _round_keys(key))
        outside = values >= count
    return values.astype(np.int64)


def shares(weights: Mapping[str, float]) -> list[int]:
    """How many sequences of a block each part of a mix gets: largest remainders, `BLOCK` in all.

    Raises:
        DataError: a weight is too small for one sequence a block.
    """
    total = sum(weights.values())
    quotas = [weight / total * BLOCK for weight in weights.values()]
    for (name, weight), quota in zip(weights.items(), quotas, strict=True):
        if quota < 1 - 1e-9:
            smallest = (total - weight) / (BLOCK - 1) * 1.0005  # survives rounding to four digits
            raise DataError(
                f"data.mix: the weight {weight:g} of {name!r} is less than one sequence in {BLOCK}; "
                f"needs at least {smallest:.4g} beside the other weights, or leave {name!r} out"
            )
    counts = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: BLOCK - sum(counts)]:
        counts[part] += 1
    return counts


def dealt(places: np.ndarray, counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The part that a sequence of the mix comes from, and which of that part's sequences it is, counted from 0.

    Args:
        places: numbers of sequences in the mix, 1-D.
        counts: sequences of each part in a block, as `shares` gives them.
        seed: decides the order within each block.
    """
    blocks, within = np.divmod(places, BLOCK)
    parts, numbers = np.empty_like(places), np.empty_like(places)
    for block in np.unique(blocks):
        mine = blocks == block
        part, rank = (column[within[mine]] for column in _deal(int(block), counts, seed))
        parts[mine] = part
        numbers[mine] = block * np.asarray(counts)[part] + rank
    return parts, numbers


@lru_cache(maxsize=8)
def _deal(block: int, counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each place of a block, and how many places before it have the same part."""
    places = np.arange(BLOCK)
    part = np.repeat(np.arange(len(counts)), counts)[permuted(places, BLOCK, f"{seed} block {block}")]
    rank = np.empty_like(places)
    rank[np.argsort(part, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return part, rank


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over values of 2 * `half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _round_keys(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype=np.uint64)
