"""Mamba-2 (arXiv:2405.21060): a gated Hebbian memory whose keys and queries all heads share.

`x += Out(Norm(silu(gate) * SSD(Conv(x, B, C))))` and no feed-forward part: the published block, one projection for all
inputs, twice as wide inside as the residual stream. The state-space duality is `S_t = exp(-A dt_t) S_{t-1} +
dt_t x_t B_t^T`, read as `S_t C_t + D x_t`. Against the published code the convolution has no bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.component import Component
from nestling.models.config import Mamba2Config
from nestling.models.convolution import ShortConvolution
from nestling.models.fast_weights import (
    Decay,
    FastWeightState,
    empty_state,
    fast_weight_scan,
    matrix_memory,
    per_head,
    to_heads,
)
from nestling.models.skeleton import LanguageModel, Mixer, linear


def mamba2(config: Mamba2Config) -> LanguageModel:
    return LanguageModel(config, lambda: (Mamba2(config, config.layers), []))


class Mamba2(Mixer):
    """State-space duality with a scalar decay a head.

    Parameters of a block of width d, inner width e, state size N and H heads, besides the norms:
    d (3 e + 2 N + H) + conv_width (e + 2 N) + 3 H.

    Args:
        config: see `Mamba2Config`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    def __init__(self, config: Mamba2Config, depth: int) -> None:
        super().__init__()
        self.config = config
        inner, convolved = config.inner, config.inner + 2 * config.state_width
        self.into = linear(config.width, inner + convolved + config.heads)
        self.conv = ShortConvolution(convolved, config.conv_width)
        self.decay = Decay(config.heads)
        self.skip = nn.Parameter(torch.ones(config.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.output = linear(inner, config.width, gain=depth**-0.5)

    def initial_state(self, batch: int) -> FastWeightState:
        c = self.config
        return empty_state(self.conv, batch, c.heads, c.inner // c.heads, c.state_width)

    def components(self, tokens: int) -> list[Component]:
        memory = self.initial_state(1).memory
        return [matrix_memory(memory, "−⟨M k, v⟩", "gradient descent with retention (Eq. 64)", erase=False)]

    def forward(self, x: Tensor, state: FastWeightState | None) -> tuple[Tensor, FastWeightState]:
        tail, memory = self.initial_state(x.shape[0]) if state is None else state
        c = self.config
        gate, convolved, rate = self.into(x).split((c.inner, self.conv.weight.shape[1], c.heads), dim=-1)
        convolved, tail = self.conv(convolved, tail)
        inputs, *shared = convolved.split((c.inner, c.state_width, c.state_width), dim=-1)
        values = to_heads(inputs, c.heads)
        keys, queries = (part.unsqueeze(1).expand(-1, c.heads, -1, -1) for part in shared)
        log_alpha, dt = self.decay(per_head(rate))
        read, memory = fast_weight_scan(queries, keys, values, log_alpha, dt, memory, erase=False)
        read = read.to(x.dtype) + self.skip.view(-1, 1, 1) * values
        read = read.transpose(1, 2).flatten(2) * F.silu(gate)
        return self.output(self.norm(read)), FastWeightState(tail, memory)
