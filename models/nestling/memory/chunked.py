"""The memory operations as batched matrix products over blocks of tokens: exact, on any device.

Within a block every key and local gradient is known beforehand, so each layer's token recurrence has a closed form
(`nestling.memory.layer`). All five memories of a layer share their keys in w2, so their w2 are one matrix of 5 N rows;
their w1 are one batch of five. Inside a block tokens are columns: (..., width, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.memory.layer import Gates, learn
from nestling.memory.recompute import scan
from nestling.memory.rule import Rule, l2norm
from nestling.memory.state import MEMORIES, SCALAR_MEMORIES, Layers, MemoryState, Weights

#: Tokens of a block at most: the triangular systems are TILE x TILE, whatever the chunk size of the model.
TILE = 64


def delta_scan(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    base: Tensor | None,
    erase: bool,
    read: str,
    blocks_per_state: int,
) -> tuple[Tensor, Tensor]:
    if keys.shape[2] == 0:
        return queries.new_empty(*local_grads.shape), initial

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor]]:
        (weights,), (base, first) = carry, constants
        z, delta, log_gate, step, q = (stream.mT for stream in inputs)
        gates = Gates(log_gate, inclusive=read == "after")
        new, output = learn(weights, base, z, delta, step, None if read == "boundary" else q, gates, erase)
        if output is None:
            output = first @ q
        return output.mT, (new,)

    spans = [(start, min(start + TILE, keys.shape[2])) for start in range(0, keys.shape[2], TILE)]
    inputs = (keys, local_grads, log_alpha.unsqueeze(-1), eta.unsqueeze(-1), queries)
    outputs, (final,) = scan(body, spans, (initial,), inputs, (base, initial), blocks_per_state)
    return outputs, final


def stack(weights: Weights) -> Layers:
    """The five memories as two tensors: w1 (B, H, 5, D, N), zero rows in scalar memories; w2 (B, H, 5 N, D)."""
    width = weights["key"][1].shape[-1]
    firsts, seconds = zip(*(weights[name] for name in MEMORIES), strict=True)
    w1 = torch.stack([F.pad(first, (0, 0, 0, width - first.shape[-2])) for first in firsts], dim=2)
    return w1, torch.cat(seconds, dim=-2)


def unstack(w1: Tensor, w2: Tensor, like: Weights) -> dict[str, Layers]:
    """The inverse of `stack`; `like` gives the shapes."""
    parts = zip(MEMORIES, w1.unbind(2), w2.chunk(len(MEMORIES), dim=-2), strict=True)
    return {name: (first[..., : like[name][0].shape[-2], :], second) for name, first, second in parts}


def blocks(position: int, tokens: int, sizes: set[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks that cross no boundary of any of these chunk sizes and are at most TILE long."""
    start = 0
    while start < tokens:
        left = min(size - (position + start) % size for size in sizes)
        end = min(start + min(left, TILE), tokens)
        yield start, end
        start = end


def self_modifying_scan(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    rule: Rule,
    eta_max: Tensor,
    eta_bias: Tensor,
    alpha_bias: Tensor,
    blocks_per_state: int,
) -> tuple[Tensor, MemoryState]:
    if x.shape[2] == 0:
        return x.new_empty(x.shape), state
    spans = list(blocks(state.position, x.shape[2], {rule.chunk_size, rule.projection_chunk_size}))
    ends = [state.position + end for _, end in spans]

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs, w1, w2 = _block(inputs, carry, constants, rule)
        *_, frozen1, frozen2 = carry
        n_memory = frozen2.shape[-2] // len(MEMORIES)
        projections = ends[block] % rule.projection_chunk_size == 0
        memory = ends[block] % rule.chunk_size == 0
        if projections and memory:
            return outputs, (w1, w2, w1, w2)
        if projections:
            frozen1 = torch.cat([w1[:, :, :-1], frozen1[:, :, -1:]], dim=2)
            frozen2 = torch.cat([w2[:, :, :-n_memory], frozen2[:, :, -n_memory:]], dim=2)
        elif memory:
            frozen1 = torch.cat([frozen1[:, :, :-1], w1[:, :, -1:]], dim=2)
            frozen2 = torch.cat([frozen2[:, :, :-n_memory], w2[:, :, -n_memory:]], dim=2)
        return outputs, (w1, w2, frozen1, frozen2)

    bases = stack(state.base) if rule.decay_to == "initial" else (None, None)
    scalars = tuple(scalar.view(1, -1, 1, 1) for scalar in (eta_max, eta_bias, alpha_bias))
    carry = (*stack(state.weights), *stack(state.snapshots))
    outputs, (w1, w2, frozen1, frozen2) = scan(body, spans, carry, (x, queries), (*bases, *scalars), blocks_per_state)
    weights, snapshots = unstack(w1, w2, state.weights), unstack(frozen1, frozen2, state.weights)
    return outputs, MemoryState(weights, snapshots, state.base, state.position + x.shape[2])


def _block(inputs: tuple, carry: tuple, constants: tuple, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """One block of C tokens (B, H, C, D) through all five memories: outputs (B, H, C, D), new w1 and w2."""
    x, queries = (stream.mT for stream in inputs)
    (w1, w2, frozen1, frozen2), (base1, base2, *scalars) = carry, constants
    hidden = w1.shape[-1]
    k, v, eta, log_alpha = _project(x, frozen1, frozen2, *scalars)
    gates = Gates(log_alpha, inclusive=rule.read == "after")
    pre, h, error = _inner_error(k, v, frozen1, frozen2, rule)

    # Every layer learns; `memory`, the last, is also read.
    evolving = None if rule.read == "boundary" else queries
    pre_q, new2 = None, w2
    if rule.writes_w2:
        delta2 = _SiluBackward.apply((frozen1.mT @ error).flatten(2, 3), pre)
        new2, pre_q = learn(
            w2, base2, k, delta2, rule.step(eta, k, dim=-2), evolving, gates, rule.erases_w2, reader=4 * hidden
        )
    elif evolving is not None:
        pre_q = w2[:, :, 4 * hidden :] @ queries
    h_q = None if pre_q is None else F.silu(pre_q).unsqueeze(2)
    keys1 = h if rule.step_size == "proximal" else l2norm(h, dim=-2)
    step1 = rule.step(eta.unsqueeze(2), h, dim=-2)
    new1, inner = learn(w1, base1, keys1, error, step1, h_q, gates.unsqueeze(2), rule.erases_w1, reader=4)
    if inner is None:
        inner = frozen1[:, :, 4:] @ F.silu(frozen2[:, :, 4 * hidden :] @ queries).unsqueeze(2)
    return (queries + inner.squeeze(2)).mT, new1, new2


def _project(
    x: Tensor, frozen1: Tensor, frozen2: Tensor, eta_max: Tensor, eta_bias: Tensor, alpha_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the frozen memories make of x (B, H, D, C): unit k and v (B, H, D, C), eta and log alpha (B, H, 1, C)."""
    hidden = frozen1.shape[-1]
    h = F.silu(frozen2[:, :, : 4 * hidden] @ x).unflatten(2, (4, hidden))
    h_projections, h_gates = h.split(2, dim=2)
    frozen_projections, frozen_gates, _ = frozen1.split((2, 2, 1), dim=2)
    k, v = l2norm(x.unsqueeze(2) + frozen_projections @ h_projections, dim=-2).unbind(2)
    eta, alpha = (frozen_gates[..., :1, :] @ h_gates).unbind(2)
    return k, v, eta_max * torch.sigmoid(eta + eta_bias), F.logsigmoid(alpha + alpha_bias)


def _inner_error(k: Tensor, v: Tensor, frozen1: Tensor, frozen2: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Of the frozen memories: w2 k (B, H, 5 N, C), its silu (B, H, 5, N, C) and the error (B, H, 5, D, C)."""
    memories = (len(MEMORIES), frozen1.shape[-1])
    pre = frozen2 @ k
    h = F.silu(pre).unflatten(2, memories)
    target = F.silu(frozen2 @ v).unflatten(2, memories)
    # M(k) - M(v) takes one product with w1; key, value and memory skip it, eta and alpha do not.
    inner, outer = (-target, -v) if rule.objective == "dot" else (h - target, k - v)
    skip = k.new_tensor([name not in SCALAR_MEMORIES for name in MEMORIES]).view(-1, 1, 1)
    return pre, h, torch.addcmul(frozen1 @ inner, skip, outer.unsqueeze(2))


class _SiluBackward(torch.autograd.Function):
    """grad * silu'(pre), itself with a derivative: with s = sigmoid(pre), silu'' = s (1 - s) (2 + pre - 2 s pre)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(grad, pre)
        return torch.ops.aten.silu_backward(grad, pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        grad, pre = ctx.saved_tensors
        s = torch.sigmoid(pre)
        curve = torch.addcmul(pre, pre, s, value=-2).add_(2)
        grad_pre = curve.mul_(outer).mul_(torch.ops.aten.sigmoid_backward(grad, s))
        return torch.ops.aten.silu_backward(outer, pre), grad_pre
