"""Two regressions that arrive as a stream: tasks along orthogonal directions, and a stable rule with a fast context.

Both are what a linear learner is trained on step by step; neither has tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.tasks.task import generator


@dataclass(frozen=True)
class OrthogonalTasks:
    """Linear regressions one after another whose gradients never share a direction (arXiv:2512.24695, Eq. 45).

    Task i draws x = xi u_i with xi ~ N(0, 1) and y = c_i xi + noise, so that the gradient of L_i(w) = E (w.x - y)^2 is
    2 (w.u_i - c_i) u_i: learning one task does not touch another, but a momentum that still points along the task
    before it does. `u` (tasks, dimension) are orthonormal, c (tasks,) are standard normal. Chance, the loss of w = 0,
    is c_i^2 + noise^2.

    Attributes:
        dimension: of x and w, at least `tasks`.
        tasks: how many follow one another.
        noise: standard deviation of what cannot be predicted.
        seed: of the directions and targets.
    """

    dimension: int = 16
    tasks: int = 8
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tasks <= self.dimension:
            raise ValueError(f"tasks: got {self.tasks}, needs 1 to dimension={self.dimension} orthogonal directions")

    @property
    def directions(self) -> Tensor:
        """u (tasks, dimension), float64."""
        square = torch.randn(self.dimension, self.dimension, generator=generator(self.seed), dtype=torch.float64)
        return torch.linalg.qr(square)[0][: self.tasks]

    @property
    def solutions(self) -> Tensor:
        """c (tasks,), float64: what w.u_i should be."""
        return torch.randn(self.tasks, generator=generator(self.seed + 1), dtype=torch.float64)

    def sample(self, task: int, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """x (count, dimension) and y (count,) of one task."""
        size = torch.randn(count, generator=source, dtype=torch.float64)
        noise = self.noise * torch.randn(count, generator=source, dtype=torch.float64)
        return size.unsqueeze(1) * self.directions[task], size * self.solutions[task] + noise

    def loss(self, weight: Tensor, task: int) -> Tensor:
        """E (w.x - y)^2 of one task at weight (dimension,), exactly."""
        return (weight.to(torch.float64) @ self.directions[task] - self.solutions[task]) ** 2 + self.noise**2

    def chance(self, task: int) -> float:
        """The loss of one who predicts zero."""
        return float(self.solutions[task] ** 2 + self.noise**2)


SLOPE, WAVE, NOISE = 2.0, 5.0, 0.2
STEPS, END = 300, 60.0


def stable_rule(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A slope that never changes under a context that always does: y = 2 x + 5 sin(t / 4) + 0.2 noise.

    The times t go evenly from 0 to 60. A learner predicts w x + b: w has to keep 2, b has to follow the wave. A learner
    that predicts zero is off by E |y|, about 3.5; one that knows rule and wave by 0.2 E |noise|, about 0.16.

    Args:
        x, noise: (300,) standard normal numbers, float64.

    Returns:
        The wave 5 sin(t / 4) and y, (300,) each.
    """
    wave = WAVE * torch.sin(torch.linspace(0, END, STEPS, dtype=torch.float64) / 4)
    return wave, SLOPE * x + wave + NOISE * noise
