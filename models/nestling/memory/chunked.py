"""The memory operations as batched matrix products over blocks of tokens: exact, on any device.

Within a block every key and local gradient is known beforehand, so the token recurrence
`W_t = base + alpha_t (W_{t-1} - base) - eta_t (W_{t-1} z_t + delta_t) z_t^T` has a closed form: the rows `r_t` that
each token writes solve one unit lower-triangular system (WY form of a product of Householder-like factors; the
derivation is in Yang et al. 2024, arXiv:2406.06484, with the retention gate of arXiv:2412.06464). All five memories of
a layer share their keys in w2, so their w2 are one matrix of 5 N rows; their w1 are one batch of five.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.recompute import scan
from nestling.memory.rule import Rule, l2norm
from nestling.memory.state import MEMORIES, Layers, MemoryState, Weights

#: Tokens of a block at most: the triangular systems are TILE x TILE, whatever the chunk size of the model.
TILE = 64
#: log(alpha) below this is a gate that is shut: its exponential is nothing beside 1, and differences stay exact.
SHUT = {torch.float32: -40.0, torch.float64: -100.0}


class Gates:
    """Cumulated retention inside a block of C tokens; only ratios of later to earlier gates are formed, all <= 1.

    With log_alpha (..., C, 1), b_t the product of the gates up to t:
    after = b_t and before = b_{t-1} (..., C, 1), rest = b_C / b_t (..., C, 1), end = b_C (..., 1, 1),
    earlier[t, s] = b_{t-1} / b_s for s < t, up_to[t, s] = b_t / b_s for s <= t (..., C, C), zero elsewhere.
    """

    def __init__(self, log_alpha: Tensor, inclusive: bool) -> None:
        log_alpha = log_alpha.clamp(min=SHUT[log_alpha.dtype])
        total = log_alpha.cumsum(dim=-2)
        previous = total - log_alpha
        self.before, self.end = previous.exp(), total[..., -1:, :].exp()
        self.rest = (total[..., -1:, :] - total).exp()
        mask = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device)
        # Masked before the exponential: an overflow there would become NaN in the backward pass.
        self.earlier = (previous - total.mT).masked_fill(mask.triu(), float("-inf")).exp()
        self.read_decay, self.read_ratio = self.before, self.earlier
        if inclusive:
            self.read_decay = total.exp()
            self.read_ratio = (total - total.mT).masked_fill(mask.triu(1), float("-inf")).exp()

    def unsqueeze(self, dim: int) -> Gates:
        """The same gates for tensors with one more batch axis."""
        wider = object.__new__(Gates)
        wider.__dict__ = {name: value.unsqueeze(dim) for name, value in self.__dict__.items()}
        return wider


def written_rows(
    weights: Tensor, base: Tensor | None, keys: Tensor, local_grads: Tensor, step: Tensor, gates: Gates, erase: bool
) -> Tensor:
    """Row r_t (..., C, m) that token t adds as r_t z_t^T, from the weights (..., m, n) at the block's start."""
    if not erase:
        return -step * local_grads
    moved = weights if base is None else weights - base
    target = gates.before * (keys @ moved.mT) + local_grads
    if base is not None:
        target = target + keys @ base.mT
    lower = step * gates.earlier * (keys @ keys.mT)
    return torch.linalg.solve_triangular(lower, -step * target, upper=False, unitriangular=True)


def end_weights(weights: Tensor, base: Tensor | None, keys: Tensor, rows: Tensor, gates: Gates) -> Tensor:
    """The weights (..., m, n) after the block."""
    kept = gates.end * weights if base is None else base + gates.end * (weights - base)
    return kept + rows.mT @ (gates.rest * keys)


def evolving_read(
    weights: Tensor, base: Tensor | None, keys: Tensor, rows: Tensor, gates: Gates, queries: Tensor
) -> Tensor:
    """What each query (..., C, n) reads from the weights of its own token: (..., C, m)."""
    moved = weights if base is None else weights - base
    output = gates.read_decay * (queries @ moved.mT) + (gates.read_ratio * (queries @ keys.mT)) @ rows
    return output if base is None else output + queries @ base.mT


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
        (weights,), (z, delta, log_gate, step, q), (base, first) = carry, inputs, constants
        gates = Gates(log_gate, inclusive=read == "after")
        rows = written_rows(weights, base, z, delta, step, gates, erase)
        output = q @ first.mT if read == "boundary" else evolving_read(weights, base, z, rows, gates, q)
        return output, (end_weights(weights, base, z, rows, gates),)

    spans = [(start, min(start + TILE, keys.shape[2])) for start in range(0, keys.shape[2], TILE)]
    inputs = (keys, local_grads, log_alpha.unsqueeze(-1), eta.unsqueeze(-1), queries)
    outputs, (final,) = scan(body, spans, (initial,), inputs, (base, initial), blocks_per_state)
    return outputs, final


def stack(weights: Weights) -> Layers:
    """The five memories as two tensors: w1 (B, H, 5, D, N), scalar memories filled up with zero rows; w2 (B, H, 5 N, D)."""
    width = weights["key"][1].shape[-1]
    w1 = torch.stack([F.pad(w1, (0, 0, 0, width - w1.shape[-2])) for w1, _ in map(weights.get, MEMORIES)], dim=2)  # type: ignore[misc]
    return w1, torch.cat([weights[name][1] for name in MEMORIES], dim=-2)


def unstack(w1: Tensor, w2: Tensor, like: Weights) -> dict[str, Layers]:
    """The inverse of `stack`; `like` gives the shapes."""
    parts = zip(MEMORIES, w1.unbind(2), w2.chunk(len(MEMORIES), dim=-2), strict=True)
    return {name: (first[..., : like[name][0].shape[-2], :], second) for name, first, second in parts}


def blocks(position: int, tokens: int, rule: Rule) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks that cross no chunk boundary of either size and are at most TILE long."""
    start = 0
    while start < tokens:
        left = min(size - (position + start) % size for size in (rule.chunk_size, rule.projection_chunk_size))
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
    spans = list(blocks(state.position, x.shape[2], rule))
    ends = [state.position + end for _, end in spans]

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor, ...]]:
        w1, w2, frozen1, frozen2 = carry
        outputs, w1, w2 = _block(*inputs, w1, w2, frozen1, frozen2, *constants, rule)
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
    outputs, carry = scan(body, spans, carry, (x, queries), (*bases, *scalars), blocks_per_state)
    weights, snapshots = unstack(*carry[:2], state.weights), unstack(*carry[2:], state.weights)
    return outputs, MemoryState(weights, snapshots, state.base, state.position + x.shape[2])


def _block(
    x: Tensor,
    queries: Tensor,
    w1: Tensor,
    w2: Tensor,
    frozen1: Tensor,
    frozen2: Tensor,
    base1: Tensor | None,
    base2: Tensor | None,
    eta_max: Tensor,
    eta_bias: Tensor,
    alpha_bias: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of C tokens (B, H, C, D) through all five memories: outputs (B, H, C, D), new w1 and w2."""
    tokens, hidden, memory = x.shape[-2], w1.shape[-1], len(MEMORIES) - 1

    h = _heads(F.silu(x @ frozen2[:, :, : memory * hidden].mT), hidden)
    projected = h[:, :, :2] @ frozen1[:, :, :2].mT
    gate = (h[:, :, 2:] * frozen1[:, :, 2:memory, :1]).sum(dim=-1, keepdim=True)
    k, v = l2norm(x + projected[:, :, 0]), x + projected[:, :, 1]
    eta = eta_max * torch.sigmoid(gate[:, :, 0] + eta_bias)
    gates = Gates(F.logsigmoid(gate[:, :, 1] + alpha_bias), inclusive=rule.read == "after")

    pre = torch.cat([k, l2norm(v)], dim=-2) @ frozen2.mT
    activated = _heads(F.silu(pre), hidden)
    read = activated @ frozen1.mT
    h, target = activated[..., :tokens, :], read[..., tokens:, :]
    error = -target if rule.objective == "dot" else read[..., :tokens, :] - target
    # The skip connection of key, value and memory; eta and alpha have none.
    skip = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=x.dtype, device=x.device).view(-1, 1, 1)
    error = error + skip * (-l2norm(v) if rule.objective == "dot" else k - l2norm(v)).unsqueeze(2)

    wide = gates.unsqueeze(2)
    keys1 = h if rule.step_size == "proximal" else l2norm(h)
    step1 = rule.step(eta.unsqueeze(2).expand(*h.shape[:-1], 1), h)
    rows1 = written_rows(w1, base1, keys1, error, step1, wide, rule.erases_w1)
    new1 = end_weights(w1, base1, keys1, rows1, wide)

    new2, rows2 = w2, None
    if rule.writes_w2:
        pre_k = pre[..., :tokens, :]
        slope = torch.sigmoid(pre_k)
        slope = slope * (1 + pre_k * (1 - slope))
        delta2 = (error @ frozen1).transpose(2, 3).flatten(-2) * slope
        rows2 = written_rows(w2, base2, k, delta2, rule.step(eta, k), gates, rule.erases_w2)
        new2 = end_weights(w2, base2, k, rows2, gates)

    if rule.read == "boundary":
        inner = F.silu(queries @ frozen2[:, :, -hidden:].mT) @ frozen1[:, :, memory].mT
        return queries + inner, new1, new2
    if rows2 is None:
        pre_q = queries @ w2[:, :, -hidden:].mT
    else:
        memory_base2 = None if base2 is None else base2[:, :, -hidden:]
        pre_q = evolving_read(w2[:, :, -hidden:], memory_base2, k, rows2[..., -hidden:], gates, queries)
    memory_base1 = None if base1 is None else base1[:, :, memory]
    inner = evolving_read(
        w1[:, :, memory], memory_base1, keys1[:, :, memory], rows1[:, :, memory], gates, F.silu(pre_q)
    )
    return queries + inner, new1, new2


def _heads(wide: Tensor, hidden: int) -> Tensor:
    """(B, H, C, k N) to (B, H, k, C, N)."""
    return wide.unflatten(-1, (-1, hidden)).transpose(2, 3)
