"""How a small model is trained on a task: everything but the model, the task and the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Steps, batches, optimizer and schedule of one training."""

    #: Optimizer steps.
    steps: int = 1000
    #: Sequences in a batch.
    batch: int = 64
    #: Tokens in a batch at least: of short sequences it takes more.
    batch_tokens: int = 0
    #: Training examples, drawn once and gone through in epochs; None: new ones at each step.
    examples: int | None = None
    #: Peak learning rate.
    learning_rate: float = 3e-3
    #: Steps of the linear warm-up; a cosine follows.
    warmup: int = 20
    #: Learning rate at the end, as a fraction of the peak.
    final_learning_rate: float = 0.0
    #: Largest norm of the gradient.
    clip: float = 1.0
    #: Update rule, one of `nestling.optim.COMPONENTS`, and its settings besides the learning rate.
    optimizer: str = "adamw"
    settings: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.98), "weight_decay": 0.0})
    #: Peak learning rate of what is no matrix (embeddings, head, filters, vectors); None: the same.
    other_rate: float | None = None
    #: Optimizer steps between two moves of each Continuum Memory System level, fastest first; empty: every step.
    periods: tuple[int, ...] = ()
    #: Steps from one look at the validation examples to the next.
    check_every: int = 100
    #: Score on the validation examples (from 0 to 1) at which the training ends early; None: never.
    enough: float | None = None
    #: Score on its own validation examples at which an easier stage is left early; None: never.
    stage_enough: float | None = None

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at step `step`, counted from 1."""
        if step <= self.warmup:
            return step / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup + 1, 1)  # no step has a rate of zero
        low = self.final_learning_rate
        return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
