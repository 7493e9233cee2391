"""Pass-key retrieval: five digits said once in a long text, to be said again at its end (Mohtashami & Jaggi 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nestling.tasks.task import IGNORE, Examples, Task, generator

DIGITS = 5
SENTENCE = b" The pass key is %s. Remember it. "
QUESTION = b" The pass key is "


@dataclass(frozen=True)
class PassKey(Task):
    """Filler text of bytes with one sentence that tells the key, and the question at the end; bytes are the tokens.

    Only the digits of the answer are scored, all of them must be right. They are read one after the other with the
    right ones before them, which is exactly what greedy generation needs to get all of them right. Chance: 1e-5.

    Attributes:
        filler: the text around the sentence, at least `longest` bytes; every sequence takes a random stretch.
        lengths: bytes of a test sequence, the answer included; one test for each length and depth.
        depths: where the sentence stands, from 0 (first) to 1 (right before the question).
        trials: sequences of one test.
        train_length: bytes of a training sequence, whose depth is random.
        vocabulary: tokens of the model; 257 is the byte tokenizer's.
    """

    name = "pass-key"
    metric = "sequence_accuracy"
    filler: bytes = field(repr=False)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 20
    train_length: int = 512
    vocabulary: int = 257

    def __post_init__(self) -> None:
        shortest, longest = min(*self.lengths, self.train_length), max(*self.lengths, self.train_length)
        needed = len(SENTENCE) + len(QUESTION) + 2 * DIGITS
        if shortest < needed:
            raise ValueError(f"lengths: got {shortest}, needs at least {needed} for the sentence and the question")
        if len(self.filler) < longest:
            raise ValueError(f"filler: got {len(self.filler)} bytes, needs at least the longest length, {longest}")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        depths = torch.rand(count, generator=generator).tolist()
        return self._examples(self.train_length, depths, generator)

    def tests(self, seed: int) -> dict[str, Examples]:
        source = generator(4 * seed)
        return {
            self.test_name(length, depth): self._examples(length, [depth] * self.trials, source)
            for length in self.lengths
            for depth in self.depths
        }

    def chance(self, test: str) -> float:
        return 10.0**-DIGITS

    @staticmethod
    def test_name(length: int, depth: float) -> str:
        """What `tests` calls the test of this length and depth."""
        return f"{length} bytes, depth {depth:g}"

    def _examples(self, length: int, depths: list[float], source: torch.Generator) -> Examples:
        inputs = torch.stack([torch.tensor(list(text)) for text in self._texts(length, depths, source)])
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -DIGITS:] = inputs[:, -DIGITS:]
        return Examples(inputs[:, :-1], targets[:, 1:])

    def _texts(self, length: int, depths: list[float], source: torch.Generator) -> Iterator[bytes]:
        for depth in depths:
            digits = bytes(48 + digit for digit in torch.randint(10, (DIGITS,), generator=source).tolist())
            sentence = SENTENCE % digits
            room = length - len(sentence) - len(QUESTION) - DIGITS
            start = int(torch.randint(len(self.filler) - room + 1, (), generator=source))
            text, place = self.filler[start : start + room], round(depth * room)
            yield text[:place] + sentence + text[place:] + QUESTION + digits
