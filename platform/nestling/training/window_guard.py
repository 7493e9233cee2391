"""Which windows may stay learnt: one that damages what is known without teaching anything is undone.

A new domain raises the losses on old ones as much as garbage does, so the probes alone decide nothing. What tells them
apart is the window's own held-out slice: after learning, a model reads a real domain better than before, and better
than the same characters in a random order, because they are in an order that says something; random bytes never are.
How often bytes occur is no such line: those of random characters beyond ASCII come in pairs, which is soon learnt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

#: Bits per byte by which a window may raise the mean loss on the old probes, and by how much the loss on its slice must
#: have fallen for it to do more.
RISE, GAIN = 0.25, 0.05
#: The same where the slice is read less than `ORDER` better than its characters in a random order: that is noise.
NOISE_RISE, ORDER = 0.05, 0.1


@dataclass(frozen=True)
class Standing:
    """Bits per byte at one moment.

    Attributes:
        probes: on the probes of the domains known before the window.
        slice: on what was held out of the window itself; None if nothing was.
        scrambled: on the same with the characters of each record in a random order.
    """

    probes: dict[str, float]
    slice: float | None
    scrambled: float | None


def harm(before: Standing, after: Standing) -> str:
    """Why a window is to be undone; empty if it may stay."""
    if not before.probes:
        return ""
    rise = sum(after.probes[name] - loss for name, loss in before.probes.items()) / len(before.probes)
    damage = f"the loss on the probes rose by {rise:.2f} bits per byte"
    if before.slice is None or after.slice is None or after.scrambled is None:
        nothing = "nothing was held out of the window that could show what it taught"
        return f"{damage}, and {nothing}" if rise > RISE else ""
    noise = after.slice > after.scrambled - ORDER
    if rise <= (NOISE_RISE if noise else RISE) or (not noise and after.slice <= before.slice - GAIN):
        return ""
    return (
        f"{damage}, and on what was held out of the window itself it went from {before.slice:.2f} to "
        f"{after.slice:.2f}, and to {after.scrambled:.2f} on its characters in a random order"
    )


def scrambled(text: str) -> str:
    """The characters of a text in a random order, the same one whenever it is asked for."""
    return "".join(random.Random(text).sample(text, len(text)))
