"""The Transformer baseline: RMSNorm, rotary positions, causal softmax attention, SwiGLU (Touvron et al. 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.attention import Attention
from nestling.models.config import TransformerConfig
from nestling.models.layers import RMSNorm, linear
from nestling.models.skeleton import LanguageModel


def transformer(config: TransformerConfig) -> LanguageModel:
    depth = 2 * config.layers
    return LanguageModel(
        config,
        lambda: (Attention(config, depth), [SwiGLU(config.width, config.mlp_hidden, depth, config.norm_eps)]),
        config.norm_eps,
    )


class SwiGLU(nn.Module):
    """W_out (silu(W_gate norm(x)) * W_in norm(x)) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, depth: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=norm_eps)
        self.into = linear(width, 2 * hidden)
        self.out = linear(hidden, width, gain=depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(self.norm(x)).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)
