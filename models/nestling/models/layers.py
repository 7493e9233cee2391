"""The layers that feed-forward parts are made of: they also take one weight a row.

A level that moves while it reads has other weights for every row of the batch (`nestling.models.continuum` puts them in
with `torch.func.functional_call`); with the module's own weights these are PyTorch's layers, to the bit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x (B, T, in) to (B, T, out) by a weight (out, in), or one a row (B, out, in); no bias."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class RMSNorm(nn.RMSNorm):
    """x (B, T, width) over its root mean square, times a gain (width,), or one a row (B, width)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight.unsqueeze(-2)


def linear(width_in: int, width_out: int, gain: float = 1.0) -> Linear:
    """A bias-free linear layer with entries of standard deviation gain / sqrt(width_in)."""
    layer = Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=gain * width_in**-0.5)
    return layer
