"""Several tasks in one training: each batch is of one of them, drawn by its share, so that none drowns in another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestling.tasks.task import Examples, Metric, Task, drawn


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks over the same tokens, for recipes that draw new examples at each step; tests are called "NAME/TEST".

    Attributes:
        parts: name, share of the batches, and task of each; the first one's validation is the mixture's.
    """

    name = "mixture"
    parts: tuple[tuple[str, float, Task], ...]

    @property
    def vocab_size(self) -> int:
        return max(task.vocab_size for _, _, task in self.parts)

    @property
    def classes(self) -> int:
        return max(task.classes for _, _, task in self.parts)

    def metric_of(self, test: str) -> Metric:
        task, own = self._of(test)
        return task.metric_of(own)

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        shares = [share for _, share, _ in self.parts]
        (_, _, task), *_ = drawn(generator).choices(self.parts, shares)
        return task.sample(count, generator)

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        return self.parts[0][2].validation(generator, count)

    def tests(self, seed: int) -> dict[str, Examples]:
        return {f"{name}/{test}": made for name, _, task in self.parts for test, made in task.tests(seed).items()}

    def chance(self, test: str) -> float:
        task, own = self._of(test)
        return task.chance(own)

    def _of(self, test: str) -> tuple[Task, str]:
        """The task of a test, and what the task calls it."""
        if test == "validation":
            return self.parts[0][2], test
        name, _, own = test.partition("/")
        return next(task for each, _, task in self.parts if each == name), own
