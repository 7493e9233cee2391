"""Batches of training sequences, found by the number of the batch alone.

Sequences lie one after another in a part of the corpus and share their border token; a document longer than a sequence
runs on over the next ones. The last sequence reaches back so far that it is whole, and what its neighbour predicts is
masked. So every token but the first is predicted exactly once an epoch. Epochs of a part are seeded permutations of its
sequences, parts are dealt by their weights, and both are arithmetic (`nestling.data.order`): nothing is kept, and a
batch, cut for any number of workers, is a function of its number.
"""

from __future__ import annotations

import math

import numpy as np

from nestling.data.corpus import Corpus, Part
from nestling.data.errors import DataError
from nestling.data.order import BLOCK, dealt, permuted, shares

#: Target of a token that is not to be predicted: `ignore_index` of torch's cross entropy.
IGNORED = -100


class Feed:
    """Random access to one worker's share of every batch.

    Args:
        corpus: what to read; the training side of its parts.
        sequence_length: tokens of a sequence.
        batch_sequences: sequences of a batch, over all workers.
        seed: decides the order; equal seeds give equal batches everywhere.
        rank: number of this worker, from 0.
        world: number of workers; it divides `batch_sequences`.

    Raises:
        DataError: a part has fewer sequences than its share of a batch, a weight is too small, or a batch does not
            divide over the workers.
    """

    def __init__(
        self, corpus: Corpus, sequence_length: int, batch_sequences: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_sequences % world:
            raise DataError(
                f"a batch of {batch_sequences} sequences does not divide over {world} workers; "
                f"make training.batch_tokens a multiple of {sequence_length * world}"
            )
        self._counts = tuple(shares({part.name: part.weight for part in corpus.parts}))
        for part, count in zip(corpus.parts, self._counts, strict=True):
            _check_size(part, sequence_length, math.ceil(batch_sequences * count / BLOCK), len(corpus.parts) > 1)
        self._tokens = [part.train.tokens for part in corpus.parts]
        self._length, self._batch, self._seed = sequence_length, batch_sequences, seed
        self._share = slice(rank * batch_sequences // world, (rank + 1) * batch_sequences // world)
        #: Sequences of an epoch of each part.
        self.sequences = [math.ceil((len(tokens) - 1) / sequence_length) for tokens in self._tokens]

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """This worker's rows of a batch, counted from 0.

        Returns:
            Inputs and targets, both int64 of shape (batch_sequences / world, sequence_length); targets are the tokens
            that follow the inputs, or `IGNORED` where another sequence of the epoch predicts the token.
        """
        places = np.arange(number * self._batch, (number + 1) * self._batch)[self._share]
        if len(self._tokens) == 1:
            return self._read(0, places)
        parts, numbers = dealt(places, self._counts, self._seed)
        inputs, targets = (np.empty((len(places), self._length), dtype=np.int64) for _ in range(2))
        for part in np.unique(parts):
            mine = parts == part
            inputs[mine], targets[mine] = self._read(int(part), numbers[mine])
        return inputs, targets

    def _read(self, part: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of sequences of a part, numbered through all its epochs."""
        tokens, sequences, length = self._tokens[part], self.sequences[part], self._length
        epochs, places = np.divmod(numbers, sequences)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            chosen[mine] = permuted(places[mine], sequences, f"{self._seed} part {part} epoch {epoch}")
        starts = np.minimum(chosen * length, len(tokens) - 1 - length)
        rows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        repeated = np.arange(length) < (chosen * length - starts)[:, None]  # only in the last one of an epoch
        return inputs, np.where(repeated, IGNORED, targets)


def _check_size(part: Part, length: int, sequences: int, mixed: bool) -> None:
    tokens = len(part.train.tokens)
    needed = max(length + 1, (sequences - 1) * length + 2)
    if tokens < needed:
        text, share = (
            (f"the training text of {part.name!r}", "its share of one batch,")
            if mixed
            else ("the training text", "one batch of")
        )
        raise DataError(
            f"{text} has {tokens} tokens, but {share} {sequences} sequences of {length} needs {needed}; "
            "give more text, or lower training.batch_tokens or data.sequence_length"
        )
