"""Several tasks in one training: each batch holds some sequences of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestling.tasks.task import Examples, Metric, Task


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks whose sequences are equally long, mixed by their shares; tests are called "NAME/TEST".

    Attributes:
        parts: name, share of the training sequences, and task of each; validation is the first one's.
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
        if test == "validation":
            return self.parts[0][2].metric_of(test)
        task, own = self._of(test)
        return task.metric_of(own)

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        total, made, taken, share_taken = sum(share for _, share, _ in self.parts), [], 0, 0.0
        for _, share, task in self.parts:
            share_taken += share
            upto = round(count * share_taken / total)
            made.append(task.sample(upto - taken, generator))
            taken = upto
        return Examples(*(torch.cat(part) for part in zip(*made, strict=True)))

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        return self.parts[0][2].validation(generator, count)

    def tests(self, seed: int) -> dict[str, Examples]:
        return {
            f"{name}/{test}": examples for name, _, task in self.parts for test, examples in task.tests(seed).items()
        }

    def chance(self, test: str) -> float:
        task, own = self._of(test)
        return task.chance(own)

    def _of(self, test: str) -> tuple[Task, str]:
        name, _, own = test.partition("/")
        return next(task for each, _, task in self.parts if each == name), own
