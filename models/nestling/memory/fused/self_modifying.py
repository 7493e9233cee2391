"""`self_modifying_scan` by Triton: two custom operators around the kernels, and the packing of the memories."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.chunked import blocks
from nestling.memory.fused.launch import on_device, padded, precision, warps
from nestling.memory.layer import SHUT
from nestling.memory.rule import Rule
from nestling.memory.state import MEMORIES, MemoryState, Weights

#: Tokens of a block at most, as of `nestling.memory.fused.learn`.
CHUNK = 64


def obstacle(state: MemoryState, rule: Rule, momentum: float | Tensor) -> str | None:
    """Why the kernels cannot take this call, or None."""
    if state.matrices or set(state.weights) != set(MEMORIES):
        return "the kernels take two-layer memories, and none that makes queries"
    if set(rule.adaptive) != set(MEMORIES):
        return "the kernels write all five memories"
    none = isinstance(momentum, int | float) and momentum == 0 and not state.momentum
    return None if none else "the kernels have no momentum"


def self_modifying_scan(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    rule: Rule,
    eta_max: Tensor,
    eta_bias: Tensor,
    alpha_bias: Tensor,
) -> tuple[Tensor, MemoryState]:
    """As `nestling.memory.self_modifying_scan`, of arguments that were checked: float32 states and scalars (H,)."""
    batch, heads, tokens, _ = x.shape
    if tokens == 0:
        return x.new_empty(x.shape), state
    sizes = rule.projection_chunk_size, rule.chunk_size
    ends = [(start, end, state.position + end) for start, end in blocks(state.position, tokens, set(sizes))]
    plan = [[start, end, (place % sizes[0] == 0) + 2 * (place % sizes[1] == 0)] for start, end, place in ends]
    packed = torch.cat([_pack(state.weights), _pack(state.snapshots)], dim=1)
    base = _pack(state.base) if rule.decay_to == "initial" else packed.new_zeros(1)
    scalars = torch.stack([eta_max, eta_bias, alpha_bias], dim=-1)
    tensors = [tensor.contiguous() for tensor in (x, queries, packed, base, scalars)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    spans = torch.tensor(plan, dtype=torch.int32, device=x.device)
    hidden = state.weights["key"][1].shape[2]
    switches = (rule.objective, rule.erase, rule.step_size, rule.read, rule.write)
    group = max(1, math.isqrt(len(plan))) if keep else 0
    outputs, after, _ = _scan(*tensors, spans, hidden, *switches, group)
    weights, snapshots = (_unpack(part, state.weights, batch, heads) for part in after.chunk(2, dim=1))
    return outputs, MemoryState(weights, snapshots, state.base, state.position + tokens)


def _pack(weights: Weights) -> Tensor:
    """Both layers of the five memories, (rows, 2, 5 D N); the w1 of scalar memories are filled up with zeros."""
    width = weights["key"][1].shape[-1]
    first = torch.stack([F.pad(weights[name][0], (0, 0, 0, width - weights[name][0].shape[2])) for name in MEMORIES], 2)
    second = torch.stack([weights[name][1] for name in MEMORIES], dim=2)
    rows = first.shape[0] * first.shape[1]
    return torch.stack([first.reshape(rows, -1), second.reshape(rows, -1)], dim=1)


def _unpack(packed: Tensor, like: Weights, batch: int, heads: int) -> dict[str, tuple[Tensor, Tensor]]:
    hidden, width = like["key"][1].shape[2:]
    first = packed[:, 0].view(batch, heads, len(MEMORIES), width, hidden)
    second = packed[:, 1].view(batch, heads, len(MEMORIES), hidden, width)
    return {name: (first[:, :, i, : like[name][0].shape[2]], second[:, :, i]) for i, name in enumerate(MEMORIES)}


def _constants(x: Tensor, hidden: int, switches: tuple[str, ...], based: bool) -> dict[str, Any]:
    objective, erase, step_size, read, write = switches
    width = x.shape[-1]
    wide = max(padded(width), padded(hidden))
    return {
        **{"H": x.shape[1], "D": width, "N": hidden, "DP": padded(width), "NP": padded(hidden), "WP": wide},
        **{"L2": objective == "l2", "ERASE1": erase in ("all", "last"), "ERASE2": erase in ("all", "first")},
        **{"PROXIMAL": step_size == "proximal", "READ": read, "BASED": based, "WRITE2": write == "all", "SHUT": SHUT},
        **precision(x.dtype),
        # What one block stores the next one loads: loads must not be moved ahead.
        **{"num_warps": warps(wide), "num_stages": 1},
    }


def _scratch(x: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = x.shape[0] * x.shape[1], max(padded(x.shape[-1]), padded(hidden))
    keys = x.new_empty(rows, CHUNK, wide)
    return keys, x.new_empty(rows, 3, CHUNK, dtype=torch.float64), x.new_empty(rows, CHUNK, CHUNK, dtype=torch.float32)


@torch.library.custom_op("nestling::self_modifying_scan", mutates_args=())
def _scan(
    x: Tensor,
    queries: Tensor,
    state: Tensor,
    base: Tensor,
    scalars: Tensor,
    spans: Tensor,
    hidden: int,
    objective: str,
    erase: str,
    step_size: str,
    read: str,
    write: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the state after all tokens (rows, 4, 5 D N), and that before every group of blocks.

    Args:
        state: weights w1 and w2 and their snapshots, packed.
        base: packed; anything of another shape if the gates decay towards zero.
        scalars: (H, 3): eta_max, eta_bias and alpha_bias.
        spans: (blocks, 3): start, stop, and 1 where snapshots of the projections are taken, 2 of `memory`, 3 of all.
        group: blocks of a group; 0: no state is kept.
    """
    from nestling.memory.fused import self_modifying_kernels

    outputs, after, kept = _results(
        x, queries, state, base, scalars, spans, hidden, objective, erase, step_size, read, write, group
    )
    after.copy_(state)
    constants = _constants(x, hidden, (objective, erase, step_size, read, write), base.dim() == 3)
    with on_device(x):
        self_modifying_kernels.forward[(state.shape[0],)](
            *(x, queries, after, base, scalars, spans, outputs, kept, *_scratch(x, hidden)),
            *(x.shape[2], constants.pop("H"), spans.shape[0]),
            GROUP=group,
            **constants,
        )
    return outputs, after, kept


@_scan.register_fake
def _results(
    x: Tensor,
    queries: Tensor,
    state: Tensor,
    base: Tensor,
    scalars: Tensor,
    spans: Tensor,
    hidden: int,
    objective: str,
    erase: str,
    step_size: str,
    read: str,
    write: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, *rest = state.shape
    groups = (spans.shape[0] + group - 1) // group if group else 0
    return torch.empty_like(x), torch.empty_like(state), state.new_empty(rows, groups, *rest)


@torch.library.custom_op("nestling::self_modifying_scan_backward", mutates_args=())
def _backward(
    x: Tensor,
    queries: Tensor,
    kept: Tensor,
    base: Tensor,
    scalars: Tensor,
    spans: Tensor,
    grad_outputs: Tensor,
    grad_after: Tensor,
    hidden: int,
    objective: str,
    erase: str,
    step_size: str,
    read: str,
    write: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, queries, state, base and scalars."""
    from nestling.memory.fused import self_modifying_kernels

    batch, heads, tokens, _ = x.shape
    grad_x, grad_queries, grad_state = torch.empty_like(x), torch.empty_like(queries), grad_after.clone()
    grad_base, grad_scalars = torch.zeros_like(base), scalars.new_empty(batch, heads, 3)
    again = kept.new_empty(kept.shape[0], group + 1, *kept.shape[2:])
    constants = _constants(x, hidden, (objective, erase, step_size, read, write), base.dim() == 3)
    with on_device(x):
        self_modifying_kernels.backward[(kept.shape[0],)](
            *(x, queries, kept, base, scalars, spans, grad_outputs, grad_state, grad_base, grad_scalars),
            *(grad_x, grad_queries, again, *_scratch(x, hidden), tokens, constants.pop("H"), spans.shape[0]),
            GROUP=group,
            **constants,
        )
    return grad_x, grad_queries, grad_state, grad_base, grad_scalars.sum(0)


@_backward.register_fake
def _(
    x: Tensor,
    queries: Tensor,
    kept: Tensor,
    base: Tensor,
    scalars: Tensor,
    spans: Tensor,
    grad_outputs: Tensor,
    grad_after: Tensor,
    hidden: int,
    objective: str,
    erase: str,
    step_size: str,
    read: str,
    write: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(x), like(queries), like(grad_after), like(base), like(scalars)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, queries, state, base, scalars, spans, *ctx.switches = inputs
    ctx.save_for_backward(x, queries, output[2], base, scalars, spans)
    ctx.state_shape = state.shape


def _differentiate(ctx: Any, grad_outputs: Tensor | None, grad_after: Tensor | None, _: Any) -> tuple:
    x, queries, kept, base, scalars, spans = ctx.saved_tensors
    if grad_outputs is None:
        grad_outputs = torch.zeros_like(x)
    if grad_after is None:
        grad_after = kept.new_zeros(ctx.state_shape)
    grads = _backward(
        x, queries, kept, base, scalars, spans, grad_outputs.contiguous(), grad_after.contiguous(), *ctx.switches
    )
    return *grads, *(None,) * (1 + len(ctx.switches))


_scan.register_autograd(_differentiate, setup_context=_save)
