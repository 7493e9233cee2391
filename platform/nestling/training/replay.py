"""Experience replay: a uniform sample of the sequences so far (reservoir sampling, Vitter 1985) in bounded memory.

Item n is kept with probability capacity / n. What is drawn depends on the seed and on numbers that the snapshot holds,
never on a random state, so every rank keeps the same sample and a stream that goes on draws what it would have drawn.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from nestling.data.feed import IGNORED


class Replay:
    """Sequences of the past.

    Args:
        share: sequences drawn for each new one, on average.
        limit: bytes of memory for the sequences.
        length: tokens of a sequence.
        seed: decides what is kept and drawn.
    """

    def __init__(self, share: float, limit: int, length: int, seed: int) -> None:
        self._share, self._seed = share, seed
        self._kept = np.zeros((max(1, limit // (2 * 4 * length)) if share else 0, 2, length), np.int32)
        #: Sequences that were offered so far.
        self.seen = 0
        self._filled = 0

    def add(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Offer the sequences of a batch, (sequences, length); those with nothing to predict are left out."""
        for pair in zip(inputs, targets, strict=True):
            if not len(self._kept) or not (pair[1] != IGNORED).any():
                continue
            self.seen += 1
            place = self._filled
            if self._filled < min(self.seen, len(self._kept)):
                self._filled += 1
            else:
                place = random.Random(f"{self._seed} keep {self.seen}").randrange(self.seen)
            if place < len(self._kept):
                self._kept[place] = pair

    def draw(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets to be learnt with the `count` new sequences of a step, (sequences, length)."""
        there = self._filled
        source = random.Random(f"{self._seed} draw {step}")
        wanted = self._share * count
        number = int(wanted) + (source.random() < wanted % 1)
        chosen = [source.randrange(there) for _ in range(number)] if there else []
        return self._kept[chosen, 0], self._kept[chosen, 1]

    def kept(self) -> torch.Tensor:
        """The sequences, flat, as they lie in memory: what a snapshot holds beside `seen`."""
        return torch.from_numpy(self._kept[: self._filled].reshape(-1))

    def load(self, seen: int, kept: torch.Tensor) -> None:
        """Take up a state; of more sequences than there is room for now, the first."""
        self.seen = seen
        sequences = kept.numpy().reshape(-1, *self._kept.shape[1:])[: len(self._kept)]
        self._kept[: len(sequences)] = sequences
        self._filled = len(sequences)
