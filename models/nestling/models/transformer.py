"""The Transformer baseline: RMSNorm, rotary positions, causal softmax attention, SwiGLU (Touvron et al. 2023)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.component import TOKENS, Component
from nestling.models.config import TransformerConfig
from nestling.models.skeleton import LanguageModel, Mixer, linear


def transformer(config: TransformerConfig) -> LanguageModel:
    depth = 2 * config.layers
    return LanguageModel(config, lambda: (Attention(config, depth), [SwiGLU(config.width, config.mlp_hidden, depth)]))


class Cache(NamedTuple):
    """Rotated keys and values of all tokens read so far, (B, H, tokens, D) each."""

    keys: Tensor
    values: Tensor


class Attention(Mixer):
    """Causal softmax attention with rotary positions; its state is the cache of keys and values."""

    def __init__(self, config: TransformerConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = linear(config.width, 3 * config.width)
        self.output = linear(config.width, config.width, gain=depth**-0.5)

    def initial_state(self, batch: int) -> Cache:
        empty = self.qkv.weight.new_zeros(batch, self.config.heads, 0, self.config.head_width)
        return Cache(empty, empty)

    def components(self, tokens: int) -> list[Component]:
        cache = self.initial_state(1)
        bytes_a_token = sum(part.shape[1] * part.shape[3] * part.element_size() for part in cache)
        return [
            Component(
                name="attention",
                context=TOKENS,
                objective="Σ s(k, q) ‖v − M‖² over the tokens read (Eq. 62)",
                rule="non-parametric: the minimum in closed form at each token (Eq. 27, 63)",
                updates_per_token=1.0,
                state_bytes=tokens * bytes_a_token,
                flops_per_token=4 * self.config.width * (tokens + 1) / 2,
            )
        ]

    def forward(self, x: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        past = 0 if state is None else state.keys.shape[2]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(t, past, self.config.rope_base) for t in (q, k))
        if state is not None:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
        if past == 0:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(x.shape[1], past + x.shape[1], dtype=torch.bool, device=x.device).tril(past)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2)), Cache(k, v)


def rotate(x: Tensor, offset: int, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021) on (..., T, D), the first token at position `offset`; angles in float32."""
    half = x.shape[-1] // 2
    frequencies = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=torch.float32), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate norm(x)) * W_in norm(x)) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.into = linear(width, 2 * hidden)
        self.out = linear(hidden, width, gain=depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(self.norm(x)).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)
