"""What a synthetic task is: labelled sequences from a rule, made anew from a seed, and what guessing would score.

A model reads `inputs` and is scored at some of the positions, where `targets` holds the right class. Every task is a
frozen dataclass of its settings, so that it can be compared, printed and sent to another process.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

#: The target of a position that is not scored (cross-entropy's own `ignore_index`).
IGNORE = -100

#: How a task is scored: see `nestling.tasks.scores`; "bits" is the mean loss of a scored position in bits.
Metric = Literal["accuracy", "macro_accuracy", "sequence_accuracy", "bits"]


class Examples(NamedTuple):
    """Sequences and what they are scored by.

    Attributes:
        inputs: (N, T) int64, tokens in [0, vocab_size); shorter sequences are filled up on the right, which a causal
            model cannot see.
        targets: (N, T) int64, classes in [0, classes), `IGNORE` where nothing is scored.
    """

    inputs: Tensor
    targets: Tensor


class Task(ABC):
    """A rule that makes labelled sequences. A subclass is a frozen dataclass of the rule's settings."""

    #: How it is called in tables.
    name: ClassVar[str]
    #: The score that its table shows.
    metric: ClassVar[Metric] = "accuracy"

    def metric_of(self, test: str) -> Metric:
        """The score of the test set `test`, or of the "validation" examples."""
        return self.metric

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of input tokens."""

    @property
    def classes(self) -> int:
        """Number of classes; the first `classes` logits are theirs. At most `vocab_size`."""
        return self.vocab_size

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Examples:
        """`count` training examples, the same ones for the same state of the generator."""

    @abstractmethod
    def tests(self, seed: int) -> dict[str, Examples]:
        """The test sets by name, made from their own seed and so apart from the training examples."""

    @abstractmethod
    def chance(self, test: str) -> float:
        """What guessing scores on the test set `test` in the task's metric (a share, or bits), by calculation."""

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        """Examples to choose and to stop by: neither trained on nor tested on. By default more training examples."""
        return self.sample(count, generator)

    def readout(self, model: nn.Module) -> nn.Module:
        """The model with what the task reads it through: logits (N, T, at least `classes`) from inputs (N, T)."""
        return model


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU with this seed."""
    return torch.Generator().manual_seed(seed)


def drawn(generator: torch.Generator) -> random.Random:
    """The standard library's random numbers, seeded by the next number of `generator`: for rules that need a loop."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


def padded(sequences: list[list[int]], labels: list[list[int]]) -> Examples:
    """Sequences of different lengths as one tensor, filled up on the right with token 0 and `IGNORE`."""
    length = max(map(len, sequences), default=0)
    inputs = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets = torch.full((len(sequences), length), IGNORE)
    for row, (sequence, label) in enumerate(zip(sequences, labels, strict=True)):
        inputs[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        targets[row, : len(label)] = torch.tensor(label, dtype=torch.int64)
    return Examples(inputs, targets)
