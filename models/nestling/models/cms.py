"""The Continuum Memory System of a block: one MLP a level, every level with its own frequency (arXiv:2512.24695, 7.1).

The variants differ in how levels are joined and in what a level starts from: `sequential` chains them, fastest first
(Eq. 70, 73); `nested` chains them too, but a level is reset to an initial state that the next slower one learns
(Eq. 72); `independent` adds up what they make of the same input, with trained weights (Eq. 74). When levels move is
said elsewhere: `nestling.optim.Levels` moves parameters, `nestling.models.continuum` moves levels inside a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.layers import RMSNorm, linear


class Level(nn.Module):
    """One level: W_out silu(W_in norm(x))."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.into = linear(width, hidden)
        self.out = linear(hidden, width, gain=depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.into(self.norm(x))))


def silent_level(width: int, hidden: int) -> Level:
    """A level that adds nothing to the residual stream yet: its output matrix is zero, all else is as in any other."""
    level = Level(width, hidden, depth=1)
    nn.init.zeros_(level.out.weight)
    return level


class IndependentLevels(nn.Module):
    """The head-wise variant: sum_l w_l MLP_l(x), with one trained weight a level (Eq. 74).

    The weights belong to no level. They start at 1, where the sum is the chain to first order in its residual branches.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.weights = nn.Parameter(torch.ones(len(levels)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([level(x) for level in self.levels], dim=-1) @ self.weights


def continuum_memory(width: int, hidden: Sequence[int], depth: int, variant: str = "sequential") -> list[nn.Module]:
    """The feed-forward parts of one block, each to be added to the residual stream.

    Args:
        width: of the residual stream.
        hidden: width of each level's hidden layer, fastest level first; empty: a block without levels.
        depth: residual branches of the whole model; scales the output projections at initialisation.
        variant: "sequential", "nested" (the same function; the levels' movement differs) or "independent".
    """
    levels = [Level(width, each, depth) for each in hidden]
    return [IndependentLevels(levels)] if levels and variant == "independent" else [*levels]
