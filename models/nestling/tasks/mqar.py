"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), also with keys that are assigned again.

A sequence opens with key-value pairs, key and value side by side; then the keys come back one by one at random places
between blanks, and the model must answer with the value. With `updates`, some keys get a second value before they are
asked for, and the latest counts: what a memory that erases before it writes is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestling.tasks.task import IGNORE, Examples, Task, generator

#: Places of the queries are drawn with p(slot) proportional to slot^(POWER - 1), as in the released generator.
POWER = 0.01


@dataclass(frozen=True)
class Mqar(Task):
    """Token 0 is blank, 1 to `keys` are keys, then come the values. Scored at the queries; chance is 1 / values.

    Attributes:
        pairs: keys bound in a sequence, each asked for once.
        updates: how many of them are bound again, to another value, after all pairs.
        length: tokens of a sequence, even.
        keys, values: sizes of the two vocabularies.
        test_examples: sequences of the test.

    Raises:
        ValueError: no room for the queries, or more pairs than keys or values.
    """

    name: ClassVar[str] = "mqar"

    pairs: int = 8
    updates: int = 0
    length: int = 64
    keys: int = 32
    values: int = 32
    test_examples: int = 1000

    def __post_init__(self) -> None:
        most, needed = min(self.keys, self.values), 2 * (2 * self.pairs + self.updates)
        if not 1 <= self.pairs <= most:
            raise ValueError(f"pairs: got {self.pairs}, needs 1 to {most}, the smaller of keys and values")
        if not 0 <= self.updates <= self.pairs or (self.updates and self.values < 2):
            raise ValueError(f"updates: got {self.updates}, needs 0 to {self.pairs} (pairs), and two values or more")
        if self.length % 2 or self.length < needed:
            raise ValueError(
                f"length: got {self.length}, needs an even number of at least {needed}: two tokens for each of the "
                f"{self.pairs} pairs, {self.updates} updates and {self.pairs} queries"
            )

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        context, first = 2 * (self.pairs + self.updates), 1 + self.keys
        keys = 1 + _choose(torch.ones(self.keys), count, self.pairs, generator)
        values = _choose(torch.ones(self.values), count, self.pairs, generator)
        again = _choose(torch.ones(self.pairs), count, self.updates, generator)
        other = torch.randint(1, max(self.values, 2), again.shape, generator=generator)
        new = (values.gather(1, again) + other) % self.values

        inputs = torch.zeros(count, self.length, dtype=torch.int64)
        inputs[:, 0:context:2] = torch.cat([keys, keys.gather(1, again)], dim=1)
        inputs[:, 1:context:2] = first + torch.cat([values, new], dim=1)
        slots = torch.arange(1, (self.length - context) // 2 + 1, dtype=torch.float32)
        places = context + 2 * _choose(slots ** (POWER - 1), count, self.pairs, generator)
        inputs.scatter_(1, places, keys)
        targets = torch.full_like(inputs, IGNORE)
        targets.scatter_(1, places, first + values.scatter(1, again, new))
        return Examples(inputs, targets)

    def tests(self, seed: int) -> dict[str, Examples]:
        return {"test": self.sample(self.test_examples, generator(seed))}

    def chance(self, test: str) -> float:
        """A guess among all values. Who has seen the pairs but bound nothing scores about 1 / pairs."""
        return 1 / self.values


def _choose(odds: Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices for each row (rows, count), drawn one after the other with these odds."""
    if count == 0:
        return torch.empty(rows, 0, dtype=torch.int64)
    return torch.multinomial(odds.expand(rows, -1), count, generator=generator)
