"""What the models with one matrix memory a head share: the recurrence, its state, the decay.

Linear attention, DeltaNet, Gated DeltaNet and Mamba-2 write each token's value under its key and read with its query;
all four are `nestling.memory.delta_scan` under a change of variables.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory import delta_scan
from nestling.models.component import TOKENS, Component
from nestling.models.convolution import ShortConvolution

#: log(alpha) is raised to this: what a gate of e^-60 lets through is lost in float32, and its inverse is still finite.
SHUT = -60.0


def fast_weight_scan(
    queries: Tensor, keys: Tensor, values: Tensor, log_alpha: Tensor, beta: Tensor, initial: Tensor, *, erase: bool
) -> tuple[Tensor, Tensor]:
    """Write every value under its key into a matrix S, and read `o_t = S_t q_t` after the write.

    `erase=True` is the gated delta rule `S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`
    (arXiv:2412.06464, Eq. 10; with alpha = 1 the delta rule of arXiv:2406.06484), `erase=False` the gated Hebbian rule
    `S_t = alpha_t S_{t-1} + beta_t v_t k_t^T` (linear attention; Mamba-2, arXiv:2405.21060); in arXiv:2512.24695 they
    are Eq. 65 and 64. Both are `delta_scan`: there the gate does not scale the erased part, so a step of alpha beta on
    the value v / alpha is the gated delta rule.

    Args:
        queries, keys: (B, H, T, n) and values (B, H, T, m), in one dtype.
        log_alpha, beta: (B, H, T), float32 or wider.
        initial: (B, H, m, n), float32 or wider.

    Returns:
        outputs (B, H, T, m) and S_T (B, H, m, n), float32 or wider.
    """
    queries, keys, values = (tensor.to(initial.dtype) for tensor in (queries, keys, values))
    if erase:
        log_alpha = log_alpha.clamp(min=SHUT)
        # Not values / alpha, whose derivative holds 1 / alpha^2 and overflows.
        values, beta = values * (-log_alpha).exp().unsqueeze(-1), log_alpha.exp() * beta
    return delta_scan(keys, -values, log_alpha, beta, queries, initial, erase=erase, read="after")


class FastWeightState(NamedTuple):
    """What a mixer carries: last inputs of its convolution (B, taps - 1, channels), its matrices S (B, H, m, n)."""

    tail: Tensor
    memory: Tensor


def empty_state(conv: ShortConvolution, batch: int, heads: int, m: int, n: int) -> FastWeightState:
    """The state before the first token: zeros, the matrices in float32 or wider."""
    taps, channels = conv.weight.shape
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    memory = conv.weight.new_zeros(batch, heads, m, n, dtype=dtype)
    return FastWeightState(conv.weight.new_zeros(batch, taps - 1, channels), memory)


def matrix_memory(memory: Tensor, objective: str, rule: str, erase: bool) -> Component:
    """The matrices S (1, H, m, n) of one sequence as a component: each token decays, writes and reads them."""
    return Component(
        name="matrix memory",
        context=TOKENS,
        objective=objective,
        rule=rule,
        updates_per_token=1.0,
        state_bytes=memory.numel() * memory.element_size(),
        flops_per_token=(7 if erase else 5) * memory.numel(),
    )


class Decay(nn.Module):
    """Mamba-2's decay, `alpha = exp(-A dt)` with `dt = softplus(x + dt_bias)`; at first A in [1, 16], dt in [.001, .1].

    x is (B, H, T), float32 or wider; log alpha and dt are the same.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())  # softplus(dt_bias) = dt

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(x + self.dt_bias.to(x.dtype).unsqueeze(-1))
        return -self.A_log.to(x.dtype).exp().unsqueeze(-1) * dt, dt


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, width) as (B, heads, T, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def per_head(x: Tensor) -> Tensor:
    """A number a head (B, T, H) as (B, H, T), float32 or wider: gates lose too much in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mT
