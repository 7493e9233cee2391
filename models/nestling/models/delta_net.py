"""Linear attention, DeltaNet and Gated DeltaNet: one mixer, three rules for its matrix memory.

Queries, keys and values pass a short convolution; each token writes its value under its key and reads with its query;
what is read is normalised a head, gated and projected. A SwiGLU follows. No positional encoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory.rule import l2norm
from nestling.models.component import Component
from nestling.models.config import DeltaNetConfig, GatedDeltaNetConfig, LinearAttentionConfig
from nestling.models.config.recurrent import FastWeightConfig
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
from nestling.models.transformer import SwiGLU


def linear_attention(config: LinearAttentionConfig) -> LanguageModel:
    return _model(config, LinearAttention)


def delta_net(config: DeltaNetConfig) -> LanguageModel:
    return _model(config, DeltaNet)


def gated_delta_net(config: GatedDeltaNetConfig) -> LanguageModel:
    return _model(config, GatedDeltaNet)


def _model(config: FastWeightConfig, mixer: type[FastWeights]) -> LanguageModel:
    depth = 2 * config.layers
    return LanguageModel(config, lambda: (mixer(config, depth), [SwiGLU(config.width, config.mlp_hidden, depth)]))


class FastWeights(Mixer):
    """A matrix memory a head; the rule is the subclass's.

    Parameters of a block of width d, with e = expand_v d the width of the values, besides the norm, the gates' and the
    feed-forward part: (2 d + e) (d + conv_width) + 2 d e (d e less without the output gate).

    Args:
        config: see `FastWeightConfig`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    erase = False
    #: What the memory minimises and how it moves, in the words of Nested Learning.
    objective = "−⟨M k, v⟩"
    rule = "gradient descent (Eq. 14-18)"

    def __init__(self, config: FastWeightConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        width, values = config.width, config.expand_v * config.width
        self.qkv = linear(width, 2 * width + values)
        self.conv = ShortConvolution(2 * width + values, config.conv_width)
        self.norm = nn.RMSNorm(values // config.heads, eps=1e-6)
        self.gate = linear(width, values) if config.output_gate else None
        self.output = linear(values, width, gain=depth**-0.5)

    def features(self, x: Tensor) -> Tensor:
        """Queries or keys (B, H, T, D) from the convolution's outputs."""
        raise TypeError(f"{type(self).__name__} does not define features")

    def components(self, tokens: int) -> list[Component]:
        return [matrix_memory(self.initial_state(1).memory, self.objective, self.rule, self.erase)]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and beta (B, H, T) from the block's input (B, T, width), float32 or wider."""
        raise TypeError(f"{type(self).__name__} does not define gates")

    def initial_state(self, batch: int) -> FastWeightState:
        c = self.config
        return empty_state(self.conv, batch, c.heads, c.expand_v * c.head_width, c.head_width)

    def forward(self, x: Tensor, state: FastWeightState | None) -> tuple[Tensor, FastWeightState]:
        tail, memory = self.initial_state(x.shape[0]) if state is None else state
        convolved, tail = self.conv(self.qkv(x), tail)
        width = self.config.width
        q, k, v = (
            to_heads(part, self.config.heads) for part in convolved.split((width, width, self.output.in_features), -1)
        )
        log_alpha, beta = self.gates(x)
        read, memory = fast_weight_scan(
            self.features(q), self.features(k), v, log_alpha, beta, memory, erase=self.erase
        )
        read = self.norm(read.to(x.dtype)).transpose(1, 2).flatten(2)
        if self.gate is not None:
            read = read * F.silu(self.gate(x))
        return self.output(read), FastWeightState(tail, memory)


class LinearAttention(FastWeights):
    """`S_t = S_{t-1} + v_t phi(k_t)^T`, read with phi(q_t) (arXiv:2006.16236; arXiv:2512.24695, Eq. 14-18).

    A norm of what each head reads takes the normaliser's place (arXiv:2210.10340): dividing by one number per token and
    head changes nothing that a norm follows. phi is the SiLU that ends the convolution.
    """

    def features(self, x: Tensor) -> Tensor:
        return x

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape[0], self.config.heads, x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(shape, dtype=dtype), x.new_ones(shape, dtype=dtype)


class DeltaNet(FastWeights):
    """`S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T` with unit keys (arXiv:2406.06484)."""

    erase = True
    objective = "½‖M k − v‖²"
    rule = "gradient descent: the delta rule (Eq. 65)"

    def __init__(self, config: DeltaNetConfig, depth: int) -> None:
        super().__init__(config, depth)
        self.beta = linear(config.width, config.heads)
        self.largest = 2.0 if config.allow_neg_eigval else 1.0

    def features(self, x: Tensor) -> Tensor:
        return l2norm(x)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.largest * torch.sigmoid(per_head(self.beta(x)))
        return torch.zeros_like(beta), beta


class GatedDeltaNet(DeltaNet):
    """`S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T` with unit keys (arXiv:2412.06464, Eq. 10)."""

    rule = "gradient descent with retention: the gated delta rule (Eq. 64-65)"

    def __init__(self, config: GatedDeltaNetConfig, depth: int) -> None:
        super().__init__(config, depth)
        self.rate = linear(config.width, config.heads)
        self.decay = Decay(config.heads)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, _ = self.decay(per_head(self.rate(x)))
        return log_alpha, super().gates(x)[1]
