"""DER++ (Buzzega et al. 2020, arXiv:2004.07211, Eq. 6): what is replayed shall also give the logits that it gave.

The logits of a sequence are those of the step in which it was learnt. A replayed token's loss is its cross-entropy plus
alpha times the mean squared difference of its logits from them. On a stream without task boundaries these are the
knowledge of many moments of the past ("dark": it is in no label).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nestling.data.feed import IGNORED


class DarkKnowledge:
    """One step of DER++ on one rank, whose sequences pass by in micro-batches, new ones first.

    They may be shorter than those that were kept; what is missing has nothing to predict.

    Args:
        alpha: weight of the difference from remembered logits.
        new: new sequences of this rank in the step.
        remembered: logits of the replayed ones, (replayed, length, vocabulary) float16.
        wanted: the place among `new` of each sequence whose logits are kept, by its place among all kept ones.
    """

    def __init__(self, alpha: float, new: int, remembered: Tensor, wanted: Mapping[int, int]) -> None:
        self._alpha, self._new, self._remembered, self._wanted = alpha, new, remembered, wanted
        self._passed = 0
        #: Logits of this rank's kept sequences, by their place among all kept ones.
        self.mine: dict[int, Tensor] = {}

    def penalty(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What is added to the summed loss of the next micro-batch; `targets` (sequences, length)."""
        first, self._passed = self._passed, self._passed + len(logits)
        for number, row in self._wanted.items():
            if first <= row < self._passed:
                self.mine[number] = logits[row - first].detach().half()
        replayed = slice(max(first, self._new) - first, None)
        remembered = self._remembered[max(first - self._new, 0) : max(self._passed - self._new, 0)]
        squares = (logits[replayed].float() - remembered[:, : logits.shape[1]].float()).square().mean(-1)
        return self._alpha * squares[targets[replayed] != IGNORED].sum()

    def kept(self, count: int) -> np.ndarray:
        """The logits of all `count` kept sequences, (count, length, vocabulary) float16; every rank gets the same."""
        shape = (count, *self._remembered.shape[1:])
        logits = torch.zeros(shape, dtype=torch.float16, device=self._remembered.device)
        for number, own in self.mine.items():
            logits[number, : len(own)] = own
        if count:
            dist.all_reduce(logits)  # of each sequence, one rank has them and the others zeros
        return logits.cpu().numpy()
