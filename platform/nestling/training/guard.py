"""Which steps may move the weights: a loss or gradient that is not finite, or a sudden spike, is not trained on.

A spike is a value many standard deviations above those of the steps before it, as in OLMo-core's SkipStepOptimizer;
what was skipped does not count among those, so that one bad stretch cannot make the next one look usual. Where losses
stay high after the weights went back to a checkpoint, it is the data that has changed: `forget` starts afresh.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

#: Steps that a value is compared with, and how many there must be.
WINDOW, ENOUGH = 128, 32
#: A gradient norm below so many times the usual one is no spike: clipping takes care of it.
LARGE_NORM = 10.0
#: A loss less than so many nats above the usual one is no spike, however steady the losses were.
LARGE_RISE = 0.5


class Guard:
    """Judges each optimizer step by its loss and gradient norm, and counts what it refuses.

    Args:
        sigmas: standard deviations above the mean from which on a value is a spike; 0: nothing is.
    """

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self._usual: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}
        #: Steps refused since the run began, and in a row up to now.
        self.skipped = 0
        self.in_a_row = 0
        #: Whether the last refused step was a spike, and not something that is not finite.
        self.spiking = False

    def judge(self, loss: float, norm: float) -> str:
        """Why the step must not move the weights; empty if it may. Every rank asks with the same figures."""
        # A gradient's norm varies by factors and not by differences, so it is its logarithm that is compared.
        figures = {"loss": loss, "gradient norm": math.log(norm) if norm > 0 else norm}
        for name, value in figures.items():
            if reason := self._strange(name, value):
                self.skipped += 1
                self.in_a_row += 1
                self.spiking = math.isfinite(value)
                return reason
        for name, value in figures.items():
            self._usual[name].append(value)
        self.in_a_row = 0
        return ""

    def _strange(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"the {name} is not finite"
        usual = self._usual[name]
        if not self._sigmas or len(usual) < ENOUGH:
            return ""
        mean, margin = statistics.fmean(usual), self._sigmas * statistics.pstdev(usual)
        margin = max(margin, LARGE_RISE if name == "loss" else math.log(LARGE_NORM))
        if value <= mean + margin:
            return ""
        if name == "gradient norm":
            value, mean = math.exp(value), math.exp(mean)
        return f"the {name} is {value:.4g}, a spike over the usual {mean:.4g} of the last {len(usual)} steps"

    def forget(self) -> None:
        """Take what comes next as usual."""
        for usual in self._usual.values():
            usual.clear()
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON can hold it."""
        usual = {name: list(values) for name, values in self._usual.items()}
        return {"usual": usual, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state; the number of skipped steps never goes back."""
        for name, values in state["usual"].items():
            self._usual[name] = deque(values, maxlen=WINDOW)
        self.skipped = max(self.skipped, state["skipped"])
        self.in_a_row = state["in_a_row"]
