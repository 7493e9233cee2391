"""Titans with its long-term memory as the mixer (LMM, arXiv:2501.00663, 3 and 4.4); a SwiGLU follows.

Queries, keys and values pass a short convolution with SiLU, queries and keys are normalised; each head's memory learns
`M(k) = v` while it reads, with step size, momentum and decay from the input; what is read is normalised, gated and
projected. No positional encoding. Titans' variants with attention (MAC, MAG, MAL) are not here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory import TitansState, titans_scan
from nestling.memory.rule import l2norm
from nestling.models.component import TOKENS, Component, momentum_of
from nestling.models.config import TitansConfig
from nestling.models.convolution import ShortConvolution
from nestling.models.fast_weights import per_head, to_heads
from nestling.models.skeleton import LanguageModel, Mixer, linear
from nestling.models.transformer import SwiGLU


def titans(config: TitansConfig) -> LanguageModel:
    depth = 2 * config.layers
    return LanguageModel(
        config, lambda: (LongTermMemory(config, depth), [SwiGLU(config.width, config.mlp_hidden, depth)])
    )


class LongTermMemoryState(NamedTuple):
    """What the mixer carries: the last inputs of the convolution (B, conv_width - 1, 3 width), and the memory."""

    tail: Tensor
    memory: TitansState


class LongTermMemory(Mixer):
    """A two-layer memory a head that learns keys and values as they come.

    Parameters of a block of width d with H heads of width D and memories of width N, besides norms and feed-forward
    part: 5 d^2 + 3 (conv_width + H) d + 3 H + 2 H N D.

    Args:
        config: see `TitansConfig`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    def __init__(self, config: TitansConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        heads, width, hidden = config.heads, config.width, config.memory_width or config.head_width
        self.qkv = linear(width, 3 * width)
        self.conv = ShortConvolution(3 * width, config.conv_width)
        self.gates = nn.Linear(width, 3 * heads)
        self.gate = linear(width, width)
        self.norm = nn.RMSNorm(config.head_width, eps=1e-6)
        self.output = linear(width, width, gain=depth**-0.5)
        # Keys have unit norm: entries of unit variance make a hidden layer that is bent enough to tell them apart.
        self.w2 = nn.Parameter(torch.randn(heads, hidden, config.head_width))
        scale = config.memory_gain * (hidden * config.head_width) ** -0.5
        self.w1 = nn.Parameter(torch.randn(heads, config.head_width, hidden) * scale)
        count = config.persistent_tokens
        self.persistent = nn.Parameter(torch.randn(count, width)) if count else None
        nn.init.normal_(self.gates.weight, std=0.1 * width**-0.5)
        with torch.no_grad():
            self.gates.bias.copy_(gate_biases(config))

    def initial_state(self, batch: int) -> LongTermMemoryState:
        w1, w2 = (w.expand(batch, -1, -1, -1) for w in (self.w1, self.w2))
        taps, channels = self.conv.weight.shape
        state = LongTermMemoryState(self.w1.new_zeros(batch, taps - 1, channels), TitansState.initial((w1, w2)))
        if self.persistent is not None:
            _, state = self.forward(self.persistent.expand(batch, -1, -1), state)
        return state

    def components(self, tokens: int) -> list[Component]:
        c, size, w1, w2 = self.config, self.w1.element_size(), self.w1.numel(), self.w2.numel()
        seen = tokens // c.chunk_size if c.read == "boundary" else tokens
        memory = Component(
            name="long-term memory",
            context=TOKENS,
            objective="½‖M(k) − v‖² (arXiv:2501.00663, Eq. 12)",
            rule=f"gradient descent with retention, errors of chunks of {c.chunk_size} (Eq. 13-14 there)",
            updates_per_token=seen / max(tokens, 1),
            state_bytes=2 * (w1 + w2) * size,  # weights and snapshot
            # Reads of k for the gradient and of the query, the error's way back, decay and step.
            flops_per_token=4 * (w1 + w2) + 2 * w1 + 3 * (w1 + w2),
        )
        return [memory, momentum_of(memory.name, w1 + w2, size)]

    def role(self, name: str) -> str:
        if name == "persistent":
            return "initial persistent tokens"
        return "initial long-term memory" if name in ("w1", "w2") else "projections"

    def forward(self, x: Tensor, state: LongTermMemoryState | None) -> tuple[Tensor, LongTermMemoryState]:
        tail, memory = self.initial_state(x.shape[0]) if state is None else state
        c = self.config
        convolved, tail = self.conv(self.qkv(x), tail)
        q, k, v = (to_heads(part, c.heads) for part in convolved.chunk(3, dim=-1))
        log_alpha, log_mu, theta = self._gates(x)
        read, memory = titans_scan(
            l2norm(k),
            v,
            l2norm(q),
            log_alpha,
            theta,
            log_mu,
            memory,
            chunk_size=c.chunk_size,
            read=c.read,
            decay_to=c.decay_to,
        )
        read = self.norm(read).transpose(1, 2).flatten(2)
        return self.output(read * F.silu(self.gate(x))), LongTermMemoryState(tail, memory)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log alpha, log mu and theta (B, H, T).

        The momentum applies a gradient 1 / (1 - mu) times, and the hidden layer's |h|^2 is about N / 3: theta makes up
        for both, so that `theta_max` bounds what a token changes, whatever the momentum and the memory's width.
        """
        c = self.config
        alpha, mu, theta = per_head(self.gates(x)).chunk(3, dim=1)
        log_mu = math.log(c.mu_max) + F.logsigmoid(mu)
        largest = c.theta_max * -torch.expm1(log_mu) / self.w2.shape[1]
        return F.logsigmoid(alpha), log_mu, largest * torch.sigmoid(theta)


def gate_biases(config: TitansConfig) -> Tensor:
    """Biases (3 H,) of alpha, mu and theta before their sigmoid; retention horizons spread in their logarithm."""
    low, high = (math.log(horizon) for horizon in config.horizons)
    alpha = (torch.linspace(low, high, config.heads).exp() - 1).log()
    return torch.cat([alpha, torch.full_like(alpha, config.mu_bias), torch.full_like(alpha, config.theta_bias)])
