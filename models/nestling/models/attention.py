"""Causal softmax attention with rotary positions: the associative memory that keeps every pair (arXiv:2512.24695,
Eq. 62-63), and so grows with the text unless a window bounds it.

One class serves the Llama, Qwen2, Qwen3 and Mistral families: shared heads of keys, a bias, normalised queries and
keys, a window and Llama 3's stretched rotary frequencies are options of `AttentionConfig`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.component import TOKENS, Component
from nestling.models.config.attention import AttentionConfig
from nestling.models.skeleton import Mixer, linear


class Cache(NamedTuple):
    """Rotated keys and values (B, key heads, tokens, D) of the tokens that can still be attended to, and the number of
    tokens read so far."""

    keys: Tensor
    values: Tensor
    position: int


class Attention(Mixer):
    """Causal softmax attention with rotary positions; its state is the cache of keys and values.

    Args:
        config: see `AttentionConfig`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    def __init__(self, config: AttentionConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        width, keys = config.heads * config.head_width, config.key_heads * config.head_width
        self.widths = (width, keys, keys)
        self.qkv = nn.Linear(config.width, sum(self.widths), bias=config.qkv_bias)
        nn.init.normal_(self.qkv.weight, std=config.width**-0.5)
        if config.qkv_bias:
            nn.init.zeros_(self.qkv.bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.output = linear(width, config.width, gain=depth**-0.5)

    def initial_state(self, batch: int) -> Cache:
        empty = self.qkv.weight.new_zeros(batch, self.config.key_heads, 0, self.config.head_width)
        return Cache(empty, empty, 0)

    def components(self, tokens: int) -> list[Component]:
        c, (keys, values, _) = self.config, self.initial_state(1)
        bytes_a_token = sum(part.shape[1] * part.shape[3] * part.element_size() for part in (keys, values))
        seen = min(tokens, c.window) if c.window is not None else tokens
        pairs = seen - seen * (seen - 1) / (2 * tokens)  # tokens that one attends to, on average
        return [
            Component(
                name="attention",
                context=TOKENS,
                objective="Σ s(k, q) ‖v − M‖² over the tokens attended to (Eq. 62)",
                rule="non-parametric: the minimum in closed form at each token (Eq. 27, 63)",
                updates_per_token=1.0,
                state_bytes=(seen if c.window is None else min(tokens, c.window - 1)) * bytes_a_token,
                flops_per_token=4 * c.heads * c.head_width * pairs,
            )
        ]

    def forward(self, x: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        c, position = self.config, 0 if state is None else state.position
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, c.head_width)).transpose(1, 2) for part in parts)
        cos, sin = rotations(c, position, x.shape[1], x)
        q, k = rotate(self.query_norm(q), cos, sin), rotate(self.key_norm(k), cos, sin)
        if state is not None:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
        mixed = attend(q, k, v, c.window)
        if c.window is not None and k.shape[2] >= c.window:
            kept = slice(k.shape[2] - c.window + 1, None)
            k, v = k[:, :, kept].clone(), v[:, :, kept].clone()  # a view would keep the whole alive
        return self.output(mixed.transpose(1, 2).flatten(2)), Cache(k, v, position + x.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention of queries (B, H, T, D), the last T of S tokens, to keys and values (B, G, S, D); G divides H.

    Each token attends to itself and to those before it, or to the newest `window` of them.
    """
    tokens, total = q.shape[2], k.shape[2]
    shared = q.shape[1] != k.shape[1]
    if window is None or total <= window:
        if tokens == 1 or tokens == total:
            return F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=shared)
        window = total
    mask = torch.ones(tokens, total, dtype=torch.bool, device=q.device).tril(total - tokens)
    mask = mask.triu(total - tokens - window + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)


def rotations(config: AttentionConfig, start: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D / 2) of rotary positions (Su et al. 2021) from `start` on; angles in float32."""
    positions = torch.arange(start, start + tokens, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(config, like.device))
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotary_frequencies(config: AttentionConfig, device: torch.device | None = None) -> Tensor:
    """Radians a token (D / 2,), fastest first; with `rope_scaling`, as Llama 3.1 stretches them.

    Wavelengths above original length / low_freq_factor become `factor` times longer, those below original length /
    high_freq_factor stay, and those between are interpolated. The operations and their order are those of Hugging Face
    transformers, so that logits agree far into a text as well.
    """
    width = config.head_width
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    frequencies = 1.0 / config.rope_base**exponents
    if not config.rope_scaling:
        return frequencies
    factor, low, high, length = config.rope_scaling
    wavelengths = 2 * math.pi / frequencies
    share = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of x (..., T, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
