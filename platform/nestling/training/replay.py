"""Experience replay: a uniform sample of the sequences so far (reservoir sampling, Vitter 1985) in bounded memory.

Item n is kept with probability capacity / n. What is drawn depends on the seed and on numbers that the snapshot holds,
never on a random state, so every rank keeps the same sample and a stream that goes on draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nestling.data.feed import IGNORED


class Replay:
    """Sequences of the past.

    Args:
        share: sequences drawn for each new one, on average.
        room: sequences that are kept.
        length: tokens of a sequence.
        seed: decides what is kept and drawn.
        vocabulary: logits kept of each token (see `nestling.training.dark`); 0: none.
    """

    def __init__(self, share: float, room: int, length: int, seed: int, vocabulary: int = 0) -> None:
        self._share, self._seed = share, seed
        room = room if share else 0
        self._kept = np.zeros((room, 2, length), np.int32)
        self._logits = np.zeros((room, length, vocabulary), np.float16)
        #: Sequences that were offered so far.
        self.seen = 0
        self._filled = 0

    def places(self, targets: np.ndarray) -> dict[int, int]:
        """Where each sequence of a batch will lie, by its row in the targets, (sequences, length).

        Those that are not kept are left out, as are all with nothing to predict; a later one may take an earlier one's.
        """
        places: dict[int, int] = {}
        for seen, row in enumerate(self._offered(targets), self.seen + 1):
            place = self._filled + len(places)
            if place >= len(self._kept):
                place = random.Random(f"{self._seed} keep {seen}").randrange(seen)
            if place < len(self._kept):
                places[row] = place
        return places

    def add(self, inputs: np.ndarray, targets: np.ndarray, logits: np.ndarray | None = None) -> None:
        """Offer the sequences of a batch, with the logits, (kept, length, vocabulary), of those that have `places`."""
        places = self.places(targets)
        for number, (row, place) in enumerate(places.items()):
            self._kept[place] = inputs[row], targets[row]
            if logits is not None:
                self._logits[place] = logits[number]
        self.seen += len(self._offered(targets))
        self._filled = max([self._filled, *(place + 1 for place in places.values())])

    def draw(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets (sequences, length) and logits to be learnt with the `count` new sequences of a step."""
        there = self._filled
        source = random.Random(f"{self._seed} draw {step}")
        wanted = self._share * count
        number = int(wanted) + (source.random() < wanted % 1)
        chosen = [source.randrange(there) for _ in range(number)] if there else []
        return self._kept[chosen, 0], self._kept[chosen, 1], self._logits[chosen]

    def tensors(self) -> dict[str, Tensor]:
        """The sequences and their logits, flat, as they lie in memory: what a snapshot holds beside `seen`."""
        # As whole numbers, because the sum by which a snapshot is found finite could overflow in float16.
        kept, logits = self._kept[: self._filled], self._logits[: self._filled].view(np.int16)
        return {"replay": torch.from_numpy(kept.reshape(-1)), "replay_logits": torch.from_numpy(logits.reshape(-1))}

    def load(self, seen: int, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state; of more sequences than there is room for now, the first."""
        self.seen, self._filled = seen, 0
        for name, held in (("replay", self._kept), ("replay_logits", self._logits.view(np.int16))):
            if name in tensors:
                loaded = tensors[name].numpy().reshape(-1, *held.shape[1:])[: len(held)]
                held[: len(loaded)] = loaded
                self._filled = len(loaded)

    def _offered(self, targets: np.ndarray) -> list[int]:
        """Rows of a batch that could be kept."""
        return np.flatnonzero((targets != IGNORED).any(1)).tolist() if len(self._kept) else []
