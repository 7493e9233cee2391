"""Test-then-train: the loss of every batch before the model has learnt from it (Dawid 1984; Gama et al. 2013).

Its sum in bits is the length to which the stream so far could be compressed with this model, a figure that no leaked
test set can flatter. Per byte it is given over everything, over the last steps, and with a fading factor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

#: Steps over which the windowed loss is taken.
WINDOW = 100
#: Domains that are told apart; all further ones are one, so that a stream with a domain for every user stays bounded.
DOMAINS, OTHER = 100, "other"


class Prequential:
    """Sums of bits and bytes; what has not seen a byte has no figure.

    Args:
        fading: the factor alpha of the fading sums S_i = bits_i + alpha S_(i-1), B_i = bytes_i + alpha B_(i-1), whose
            quotient is the fading loss (Gama, Sebastiao and Rodrigues 2013, Section 4.2).
    """

    def __init__(self, fading: float) -> None:
        self._fading = fading
        self._total = [0.0, 0.0]
        self._faded = [0.0, 0.0]
        self._last: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._domains: dict[str, list[float]] = {}

    def add(self, nats: Mapping[str, float], sizes: Mapping[str, float]) -> None:
        """Take in a step: summed nats and bytes by domain (the empty name where records have none)."""
        bits = {domain: value / math.log(2) for domain, value in nats.items()}
        step = (sum(bits.values()), float(sum(sizes.values())))
        self._last.append(step)
        self._total = [self._total[0] + step[0], self._total[1] + step[1]]
        self._faded = _fade(self._faded, step, self._fading)
        for domain in filter(None, bits):
            name = told_apart(domain, self._domains)
            before = self._domains.get(name, [0.0, 0.0])
            self._domains[name] = _fade(before, (bits[domain], sizes[domain]), self._fading)

    @property
    def bits_per_byte(self) -> float | None:
        """Over everything so far."""
        return _quotient(self._total)

    def metrics(self) -> dict[str, float]:
        """The figures under their names in MLflow; a domain's is its fading loss."""
        windowed = [sum(column) for column in zip(*self._last, strict=True)] or [0.0, 0.0]
        named = {
            "prequential/bits_per_byte": self.bits_per_byte,
            "prequential/windowed_bits_per_byte": _quotient(windowed),
            "prequential/fading_bits_per_byte": _quotient(self._faded),
            "prequential/code_length_bytes": self._total[0] / 8,
            "prequential/bytes": self._total[1],
        }
        named |= {f"prequential/{metric_name(name)}/bits_per_byte": _quotient(s) for name, s in self._domains.items()}
        return {name: value for name, value in named.items() if value is not None}

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON can hold it."""
        return {"total": self._total, "faded": self._faded, "last": list(self._last), "domains": self._domains}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._total, self._faded = list(state["total"]), list(state["faded"])
        self._last = deque(map(tuple, state["last"]), maxlen=WINDOW)
        self._domains = {name: list(sums) for name, sums in state["domains"].items()}


def told_apart(domain: str, known: Mapping[str, Any]) -> str:
    """A domain, or `OTHER` if it is new and there are as many as can be told apart."""
    return domain if domain in known or len(known) < DOMAINS else OTHER


def metric_name(domain: str) -> str:
    """A domain as a part of a metric's name: MLflow takes letters, digits and a few signs."""
    return "".join(sign if sign.isascii() and (sign.isalnum() or sign in "_-. ") else "_" for sign in domain)


def _fade(sums: list[float], step: tuple[float, float], fading: float) -> list[float]:
    return [step[0] + fading * sums[0], step[1] + fading * sums[1]]


def _quotient(sums: Any) -> float | None:
    bits, size = sums
    return bits / size if size else None
