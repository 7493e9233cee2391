"""Online elastic weight consolidation: what has mattered to the loss so far is held where it was.

Each weight is pulled back to where it was last consolidated, in proportion to its importance: the diagonal of the
empirical Fisher information (Kirkpatrick et al. 2017, Eq. 3; the online form of Schwarz et al. 2018, Section 3.2). It
needs no task boundaries: weights are consolidated after so many steps. All of it is element by element and lies in the
optimizer's state, so that it is sharded, saved and restored like the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nestling.optim.rules import State, buffer


@dataclass(frozen=True)
class EWC:
    """The penalty strength / 2 sum_i F_i (w_i - w*_i)^2 on every step's loss.

    F is a decaying sum of the mean squared gradients of each period, w* the weights at the end of the last one.

    Args:
        strength: weight of the penalty beside the loss; gradients enter F as the optimizer gets them, after clipping.
        every: steps of a period.
        decay: what is kept of F at the end of a period.

    Raises:
        ValueError: a setting out of range.
    """

    strength: float
    every: int
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength of EWC: got {self.strength!r}, needs a finite number of at least 0")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every of EWC: got {self.every!r}, needs an integer of at least 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay of EWC: got {self.decay!r}, needs a number from 0 to 1")

    def take_in(self, gradient: Tensor, parameter: Tensor, state: State) -> Tensor:
        """Count a step's gradient in; returns it with that of the penalty, in a new tensor."""
        buffer(state, "squares", parameter).addcmul_(gradient, gradient)
        if "anchor" not in state:
            return gradient
        return gradient.addcmul(state["fisher"], parameter - state["anchor"], value=self.strength)

    def consolidate(self, parameter: Tensor, state: State) -> None:
        """After step `state["steps"]` has moved the parameter: at a period's end, take up importance and weights."""
        if state["steps"] % self.every:
            return
        squares = buffer(state, "squares", parameter)
        buffer(state, "fisher", parameter).mul_(self.decay).add_(squares, alpha=1 / self.every)
        buffer(state, "anchor", parameter).copy_(parameter)
        squares.zero_()
