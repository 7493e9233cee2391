"""Batches: the same for any number of workers, every token once an epoch, an order that only the seed decides."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.data import IGNORED, Corpus, Counts, DataError, Feed, Part, Tokenizer, Tokens
from nestling.data.order import BLOCK, dealt, shares

LENGTH, BATCH = 5, 4


def part(tokens: np.ndarray, name: str = "text", weight: float = 1.0) -> Part:
    side = Tokens(tokens, len(tokens), 1, 1.0)
    return Part(name, weight, side, side, Counts(1, 0, 0, np.zeros((2, 0), np.int64)))


def corpus(*sizes: int, weights: tuple[float, ...] = (1.0,)) -> Corpus:
    """Every token is its own position; the part stands in the millions."""
    parts = [
        part(np.arange(size, dtype=np.int32) + 1_000_000 * number, f"part{number}", weight / sum(weights))
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return Corpus(Path("none"), Tokenizer.bytes(), tuple(parts))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("text", [corpus(204), corpus(204, 90, weights=(3, 1))], ids=["one", "mix"])
def test_the_global_batch_does_not_depend_on_the_workers(world: int, text: Corpus) -> None:
    alone = Feed(text, LENGTH, BATCH, seed=3)
    workers = [Feed(text, LENGTH, BATCH, seed=3, rank=rank, world=world) for rank in range(world)]
    for number in (*range(30), 1000):
        shares = [worker.batch(number) for worker in workers]
        for half, whole in zip(zip(*shares, strict=True), alone.batch(number), strict=True):
            assert all(rows.shape == (BATCH // world, LENGTH) and rows.dtype == np.int64 for rows in half)
            np.testing.assert_array_equal(np.concatenate(half), whole)


@settings(deadline=None)
@given(st.integers(21, 300), st.integers(1, 4), st.integers(0, 9))
def test_every_token_but_the_first_once_an_epoch(count: int, batch: int, seed: int) -> None:
    feed = Feed(corpus(count), LENGTH, batch, seed)
    rows = -(-3 * feed.sequences[0] // batch) * batch
    inputs, targets = (np.concatenate(half) for half in zip(*map(feed.batch, range(rows // batch)), strict=True))
    assert ((targets == inputs + 1) | (targets == IGNORED)).all()
    for epoch in range(3):
        mine = targets[epoch * feed.sequences[0] : (epoch + 1) * feed.sequences[0]]
        assert sorted(mine[mine != IGNORED]) == list(range(1, count))


@pytest.mark.parametrize("stop", [1, 7, 13, 26])
@pytest.mark.parametrize("text", [corpus(132), corpus(132, 30, 61, weights=(4, 1, 2))], ids=["one", "mix"])
def test_an_epoch_resumed_at_another_world_size_sees_everything_once(stop: int, text: Corpus) -> None:
    """One worker stops, two go on: hashes of (part, position) of what was predicted, each exactly once an epoch."""
    alone = Feed(text, LENGTH, BATCH, seed=5)
    pair = [Feed(text, LENGTH, BATCH, seed=5, rank=rank, world=2) for rank in range(2)]
    read = [alone.batch(number)[1] for number in range(stop)]
    read += [worker.batch(number)[1] for number in range(stop, 40) for worker in pair]
    rows = np.concatenate(read)
    for place, (each, sequences) in enumerate(zip(text.parts, alone.sequences, strict=True)):
        mine = rows[rows[:, -1] // 1_000_000 == place]
        assert len(mine) > sequences
        for first in range(0, len(mine) - sequences + 1, sequences):
            epoch = mine[first : first + sequences]
            assert hashes(epoch[epoch != IGNORED]) == hashes(each.train.tokens[1:])


def hashes(tokens: np.ndarray) -> Counter[str]:
    return Counter(hashlib.sha256(str(token).encode()).hexdigest() for token in tokens.tolist())


def test_a_position_is_only_a_number() -> None:
    forward, backward = Feed(corpus(204), LENGTH, BATCH, 1), Feed(corpus(204), LENGTH, BATCH, 1)
    batches = [forward.batch(number) for number in range(40)]
    for number in reversed(range(40)):
        np.testing.assert_array_equal(backward.batch(number), batches[number])


def test_the_seed_decides_the_order() -> None:
    for text in (corpus(204), corpus(204, 204, weights=(1, 1))):
        first, again, other = (Feed(text, LENGTH, BATCH, seed).batch(2)[0] for seed in (7, 7, 8))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_the_seed_and_the_block_decide_how_parts_are_dealt() -> None:
    places, counts = np.arange(2 * BLOCK), (768, 256)
    parts, _ = dealt(places, counts, seed=1)
    other, _ = dealt(places, counts, seed=2)
    for first, second in ((parts[:BLOCK], parts[BLOCK:]), (parts, other)):
        assert np.mean(first != second) == pytest.approx(2 * 0.75 * 0.25, abs=0.06)  # as if drawn anew


def test_epochs_differ() -> None:
    feed = Feed(corpus(201), LENGTH, BATCH, 0)  # 40 sequences, 10 batches
    assert feed.sequences == [40]
    assert (feed.batch(0)[0] != feed.batch(10)[0]).any()


@pytest.mark.parametrize("weights", [(1, 1), (3, 2, 1), (0.7, 0.2, 0.1)])
def test_every_block_of_a_mix_holds_exactly_the_shares(weights: tuple[float, ...]) -> None:
    """And each part's own sequences come in the order of its epochs, none before the one that precedes it."""
    text = corpus(*[2000] * len(weights), weights=weights)
    feed = Feed(text, LENGTH, 64, seed=1)
    counts = shares({each.name: each.weight for each in text.parts})
    assert sum(counts) == BLOCK and all(
        abs(count - BLOCK * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True)
    )
    inputs = np.concatenate([feed.batch(number)[0] for number in range(3 * BLOCK // 64)])
    parts = inputs[:, 0] // 1_000_000
    for block in parts.reshape(3, BLOCK):
        assert np.bincount(block).tolist() == counts
        assert np.count_nonzero(np.diff(block)) > BLOCK / 8  # well stirred
    for number in range(len(weights)):
        mine = inputs[parts == number]
        epochs = [mine[start : start + feed.sequences[number]] for start in range(0, len(mine), feed.sequences[number])]
        assert all(len(np.unique(epoch[:, 0])) == len(epoch) for epoch in epochs)


def test_a_part_alone_is_read_as_in_a_mix_of_one() -> None:
    alone = corpus(204)
    np.testing.assert_array_equal(
        Feed(alone, LENGTH, BATCH, 3).batch(7), Feed(corpus(204, weights=(5,)), LENGTH, BATCH, 3).batch(7)
    )


def test_a_weight_below_one_sequence_a_block() -> None:
    with pytest.raises(DataError, match=r"the weight 0\.0001 of 'b' is less than one sequence in 1024; needs at least"):
        shares({"a": 1.0, "b": 1e-4})
    smallest = 0.000978  # what the message says
    with pytest.raises(DataError, match=str(smallest)):
        shares({"a": 1.0, "b": 0.99 * smallest})
    assert shares({"a": 1.0, "b": smallest}) == [1023, 1]


def test_a_memory_map_is_enough(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(204, dtype=np.uint16))
    mapped = Corpus(tmp_path, Tokenizer.bytes(), (part(np.load(tmp_path / "tokens.npy", mmap_mode="r")),))
    np.testing.assert_array_equal(Feed(mapped, LENGTH, BATCH, 0).batch(5), Feed(corpus(204), LENGTH, BATCH, 0).batch(5))


def test_fewer_tokens_than_one_batch() -> None:
    assert Feed(corpus(17), LENGTH, BATCH, 0).sequences == [4]
    with pytest.raises(
        DataError, match="text has 16 tokens, but one batch of 4 sequences of 5 needs 17; give more text, or lower"
    ):
        Feed(corpus(16), LENGTH, BATCH, 0)
    with pytest.raises(DataError, match="text has 5 tokens, but one batch of 1 sequences of 5 needs 6"):
        Feed(corpus(5), LENGTH, 1, 0)
    with pytest.raises(
        DataError,
        match="the training text of 'part1' has 6 tokens, but its share of one batch, 2 sequences of 5 needs 7",
    ):
        Feed(corpus(200, 6, weights=(1, 1)), LENGTH, BATCH, 0)


def test_a_batch_divides_over_the_workers() -> None:
    with pytest.raises(
        DataError, match="4 sequences does not divide over 3 workers; make training.batch_tokens a multiple of 15"
    ):
        Feed(corpus(204), LENGTH, BATCH, 0, rank=0, world=3)
