"""Batches of training sequences, found by the number of the step alone.

Sequences of `sequence_length + 1` tokens lie one after another in the corpus and share their border token, so every
token but the first is predicted exactly once an epoch (a last piece shorter than a sequence is left out). An epoch is
one seeded permutation of all sequences, 8 bytes each; batches run on over the border between two epochs. A batch is
first defined for all workers and then cut, so their number changes nothing, and a position is just a number.
"""

from __future__ import annotations

import numpy as np

from nestling.data.corpus import Tokens
from nestling.data.errors import DataError


class Feed:
    """Random access to one worker's share of every batch.

    Args:
        tokens: one side of a corpus.
        sequence_length: predicted tokens of a sequence.
        batch_sequences: sequences of a batch, over all workers.
        seed: decides the order; equal seeds give equal batches everywhere.
        rank: number of this worker, from 0.
        world: number of workers; it divides `batch_sequences`.

    Raises:
        DataError: fewer sequences than one batch, or a batch that does not divide over the workers.
    """

    def __init__(
        self, tokens: Tokens, sequence_length: int, batch_sequences: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        #: Sequences of an epoch.
        self.sequences = (len(tokens.tokens) - 1) // sequence_length
        if self.sequences < batch_sequences:
            raise DataError(
                f"the training text has {len(tokens.tokens)} tokens, but one batch of {batch_sequences} sequences "
                f"of {sequence_length} needs {batch_sequences * sequence_length + 1}; give more text, "
                "or lower training.batch_tokens or data.sequence_length"
            )
        if batch_sequences % world:
            raise DataError(
                f"a batch of {batch_sequences} sequences does not divide over {world} workers; "
                f"make training.batch_tokens a multiple of {sequence_length * world}"
            )
        self._tokens = tokens.tokens
        self._length = sequence_length
        self._batch = batch_sequences
        self._seed = seed
        self._share = slice(rank * batch_sequences // world, (rank + 1) * batch_sequences // world)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> np.ndarray:
        """This worker's rows of a step's batch: int64 of shape (batch_sequences / world, sequence_length + 1)."""
        places = np.arange(step * self._batch, (step + 1) * self._batch)[self._share]
        epochs, places = np.divmod(places, self.sequences)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            chosen[mine] = self._order(int(epoch))[places[mine]]
        return self._tokens[chosen[:, None] * self._length + np.arange(self._length + 1)].astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch is never longer than an epoch, so it touches two at most.
            self._orders = {number: order for number, order in self._orders.items() if abs(number - epoch) == 1}
            self._orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(self.sequences)
        return self._orders[epoch]
