"""Which windows may stay learnt: one that damages what is known without teaching anything is undone.

A new domain raises the losses on old ones as much as garbage does, so the probes alone decide nothing. What tells them
apart is the window's own held-out slice: after learning, a model reads a real domain better than before, and better
than one that knows only how often each byte occurs; random bytes it never does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Bits per byte by which the mean loss on the old probes must have risen, and by which the slice must have fallen.
RISE, GAIN = 0.25, 0.1


@dataclass(frozen=True)
class Standing:
    """Bits per byte at one moment.

    Attributes:
        probes: on the probes of the domains known before the window.
        slice: on what was held out of the window itself; None if nothing was.
    """

    probes: dict[str, float]
    slice: float | None


def harm(before: Standing, after: Standing, entropy: float) -> str:
    """Why a window is to be undone; empty if it may stay.

    Args:
        entropy: unigram entropy of the slice, bits per byte.
    """
    if not before.probes:
        return ""
    rise = sum(after.probes[name] - loss for name, loss in before.probes.items()) / len(before.probes)
    if rise <= RISE:
        return ""
    damage = f"the loss on the probes rose by {rise:.2f} bits per byte"
    if before.slice is None or after.slice is None:
        return f"{damage}, and nothing was held out of the window that could show what it taught"
    if after.slice <= before.slice - GAIN and after.slice < entropy:
        return ""
    return (
        f"{damage}, and on what was held out of the window itself it went from {before.slice:.2f} to "
        f"{after.slice:.2f}, where knowing how often each byte occurs gives {entropy:.2f}"
    )


def unigram_entropy(texts: list[str]) -> float:
    """Entropy of the byte histogram of some texts, bits per byte; 0 for none."""
    counts = np.bincount(np.frombuffer("".join(texts).encode("utf-8"), np.uint8), minlength=1)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum())
