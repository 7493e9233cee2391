"""Batches: the same for any number of workers, every sequence once an epoch, an order that only the seed decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.data import DataError, Feed, Tokens

LENGTH, BATCH = 5, 4


def tokens(count: int) -> Tokens:
    """Every token is its own position."""
    return Tokens(np.arange(count, dtype=np.int32), count, 1, 1.0)


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_does_not_depend_on_the_workers(world: int) -> None:
    alone = Feed(tokens(204), LENGTH, BATCH, seed=3)
    workers = [Feed(tokens(204), LENGTH, BATCH, seed=3, rank=rank, world=world) for rank in range(world)]
    for step in (*range(30), 1000):
        rows = [worker.batch(step) for worker in workers]
        assert all(part.shape == (BATCH // world, LENGTH + 1) and part.dtype == np.int64 for part in rows)
        np.testing.assert_array_equal(np.concatenate(rows), alone.batch(step))


@settings(deadline=None)
@given(st.integers(21, 300), st.integers(1, 4), st.integers(0, 9))
def test_every_sequence_once_an_epoch(count: int, batch: int, seed: int) -> None:
    feed = Feed(tokens(count), LENGTH, batch, seed)
    steps = 3 * feed.sequences // batch + 1
    rows = np.concatenate([feed.batch(step) for step in range(steps)])
    assert (np.diff(rows) == 1).all()
    for epoch in range(3):
        starts = rows[epoch * feed.sequences : (epoch + 1) * feed.sequences, 0]
        assert sorted(starts) == [number * LENGTH for number in range(feed.sequences)]
    assert count - LENGTH - 1 < feed.sequences * LENGTH <= count - 1


def test_a_position_is_only_a_number() -> None:
    forward, backward = Feed(tokens(204), LENGTH, BATCH, 1), Feed(tokens(204), LENGTH, BATCH, 1)
    batches = [forward.batch(step) for step in range(40)]
    for step in reversed(range(40)):
        np.testing.assert_array_equal(backward.batch(step), batches[step])


def test_the_seed_decides_the_order() -> None:
    first, again, other = (Feed(tokens(204), LENGTH, BATCH, seed).batch(2) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_epochs_differ() -> None:
    feed = Feed(tokens(201), LENGTH, BATCH, 0)  # 40 sequences, 10 batches
    assert feed.sequences == 40
    assert (feed.batch(0) != feed.batch(10)).any()


def test_a_memory_map_is_enough(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(204, dtype=np.uint16))
    mapped = Tokens(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 204, 1, 1.0)
    np.testing.assert_array_equal(Feed(mapped, LENGTH, BATCH, 0).batch(5), Feed(tokens(204), LENGTH, BATCH, 0).batch(5))


def test_fewer_tokens_than_one_batch() -> None:
    assert Feed(tokens(21), LENGTH, BATCH, 0).sequences == 4
    with pytest.raises(
        DataError, match="has 20 tokens, but one batch of 4 sequences of 5 needs 21; give more text, or lower"
    ):
        Feed(tokens(20), LENGTH, BATCH, 0)


def test_a_batch_divides_over_the_workers() -> None:
    with pytest.raises(
        DataError, match="4 sequences does not divide over 3 workers; make training.batch_tokens a multiple of 15"
    ):
        Feed(tokens(204), LENGTH, BATCH, 0, rank=0, world=3)
