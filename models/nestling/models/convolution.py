"""The short convolution that mixers put before their memories: it shows each token its neighbours' order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over (B, T, width), followed by SiLU; `tail` holds the inputs before the first."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, width).uniform_(-1, 1) * taps**-0.5)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        taps, tokens = self.weight.shape[0], x.shape[1]
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        shifted = torch.stack([padded[:, tap : tap + tokens] for tap in range(taps)], dim=-2)
        return F.silu((shifted * self.weight).sum(dim=-2)), padded[:, tokens:]
