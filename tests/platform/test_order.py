"""The permutation: every place once, no structure that a model could learn, and no memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nestling.data.order import permuted

SIZES = [1, 2, 3, 4, 5, 1000, *(2**bits + off for bits in (4, 9, 10, 16) for off in (-1, 0, 1))]


@pytest.mark.parametrize("count", SIZES)
def test_every_place_once(count: int) -> None:
    for key in ("a", "b"):
        assert sorted(permuted(np.arange(count), count, key)) == list(range(count))


def test_keys_give_different_orders() -> None:
    orders = {tuple(permuted(np.arange(5), 5, str(key))) for key in range(2000)}
    assert len(orders) == 120  # all there are
    first = [tuple(permuted(np.arange(1000), 1000, f"0 part 0 epoch {epoch}")) for epoch in range(10)]
    assert len(set(first)) == 10


@pytest.mark.parametrize("count", [1000, 4097, 100_000])
def test_no_obvious_structure(count: int) -> None:
    places = np.arange(count)
    order = permuted(places, count, "structure")
    spread = 1 / np.sqrt(count)
    assert np.abs(order - places).mean() / count == pytest.approx(1 / 3, abs=spread)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 * spread
    assert abs(np.corrcoef(order, places)[0, 1]) < 5 * spread
    assert np.mean(np.abs(np.diff(order)) < count / 100) == pytest.approx(0.02, abs=5 * 0.14 * spread)


def test_each_place_gets_every_value_equally_often() -> None:
    count, keys = 7, 7000
    table = np.zeros((count, count))
    for key in range(keys):
        table[np.arange(count), permuted(np.arange(count), count, str(key))] += 1
    assert ((table - keys / count) ** 2 / (keys / count)).sum() < 100  # chi squared with 36 degrees of freedom


def test_a_place_of_ten_billion_costs_nothing() -> None:
    count = 10**10
    permuted(np.arange(10), count, "warm")
    tracemalloc.start()
    values = permuted(np.arange(count - 1000, count), count, "large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(set(values.tolist())) == 1000 and values.min() >= 0 and count / 2 < values.max() < count
