"""Drift: the Page-Hinkley test (Page 1954), one-sided, on the prequential loss.

One-sided, because a loss that falls is learning and no alarm. River's detectors are the same arithmetic, but their
state is an object that only pickle can save, and a snapshot runs no code when it is read: hence these lines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class PageHinkley:
    """Alarm when the sum of rises above the mean so far exceeds its lowest value by `threshold`.

    m_t = sum of (x_i - mean_i - delta) over i <= t; alarm where m_t - min m > threshold, and then a fresh start. A
    single batch of strange text is no drift: no rise counts for more than `most`, so that several must come together.

    Attributes:
        delta: rise that is tolerated, in the unit of the values.
        threshold: how much must have come together.
        warmup: values before the first alarm.
        most: what a single value's rise counts for at most.
    """

    delta: float = 0.1
    threshold: float = 3.0
    warmup: int = 10
    most: float = 1.0
    count: int = 0
    mean: float = 0.0
    excess: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> bool:
        """Take in a value, of a batch that is filled to `weight` (1: whole); whether it raises the alarm."""
        self.count += 1
        self.mean += weight * (value - self.mean) / self.count
        # m_t - min m is the sum that is never let below zero.
        self.excess = max(0.0, self.excess + weight * (min(value - self.mean, self.most) - self.delta))
        if self.count < self.warmup or self.excess <= self.threshold:
            return False
        self.count, self.mean, self.excess = 0, 0.0, 0.0
        return True

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        kept = asdict(self)
        return {name: kept[name] for name in ("count", "mean", "excess")}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self.count, self.mean, self.excess = state["count"], state["mean"], state["excess"]
