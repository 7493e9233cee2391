"""`self_modifying_scan`: the memories of a self-modifying Titans layer."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nestling.memory import chunked, reference
from nestling.memory.backends import chosen, widths_obstacle
from nestling.memory.checks import (
    check_float,
    check_no_nan,
    check_positive,
    check_same,
    check_shape,
    state_dtype,
)
from nestling.memory.fused import self_modifying as fused
from nestling.memory.rule import Rule
from nestling.memory.state import ALL_MEMORIES, MemoryState, apply_memory, check_momentum, check_weights


def self_modifying_scan(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    *,
    chunk_size: int = 64,
    projection_chunk_size: int | None = None,
    eta_max: float | Tensor = 1.0,
    eta_bias: float | Tensor = 0.0,
    alpha_bias: float | Tensor = 4.0,
    objective: str = "l2",
    erase: str = "all",
    step_size: str = "proximal",
    read: str = "before",
    decay_to: str = "zero",
    write: str = "all",
    adaptive: Collection[str] | None = None,
    momentum: float | Tensor = 0.0,
    backend: str = "auto",
    blocks_per_state: int | None = None,
) -> tuple[Tensor, MemoryState]:
    """Read a sequence with small memories that write themselves at every token.

    Keys, values, step sizes and retention gates come from four memories, queries from a fifth if the state has one, and
    all of them, `memory` included, learn the same keys with targets that they generate themselves (arXiv:2512.24695,
    Eq. 83-93). They are two-layer networks, or matrices: one linear layer without a skip connection. What a token's
    update depends on is frozen at each memory's last chunk boundary (a multiple of its chunk size, counted from
    `state.position` 0); the states evolve token by token. Any split of the tokens into calls gives the same result;
    rows of the batch never touch each other; the outer gradient passes through the writes into every weight.

    Args:
        x: (B, H, T, D), the block's input per head.
        queries: (B, H, T, D), unit-norm queries; with a memory "query" what it reads, and q = l2norm(M_query(queries)).
        state: the memories; `MemoryState.initial(weights)` makes a fresh one.
        chunk_size: tokens per snapshot of `memory`.
        projection_chunk_size: tokens per snapshot of the other memories; None: as `chunk_size`.
        eta_max: largest step size, a number or one a head (H,).
        eta_bias, alpha_bias: added to the eta and alpha memories before their sigmoid, a number or (H,).
        objective: "l2", error M(k) - v_hat; "dot", error -v_hat.
        erase: layers with the Delta term: "all", "first" (w2), "last" (w1), "none". The one layer of a matrix memory
            is its first and its last: it erases unless this is "none".
        step_size: "proximal", eta / (1 + eta |z|^2) for the layer's input z; "direct", eta with w1's key normalised.
        read: the state that token t reads: "before" its own update, "after" it, or at the last "boundary".
        decay_to: "zero" or the "initial" weights of the state.
        write: "all", or "last" (w1 only; w2 keeps its value). A matrix memory is written either way.
        adaptive: names of the memories that are written; None: all. The others are read, and neither learn nor decay.
        momentum: mu in [0, 1), a number or one a head (H,): a layer moves along S_t = mu S_{t-1} + delta_t z_t^T in the
            place of its gradient, W_t = W_{t-1} (alpha I - eta z z^T) - eta S_t, and the state carries S.
        backend: "reference" (token loop), "chunked" (matrix products), "triton" (fused kernels: CUDA, widths 16 to 256,
            float32 or shorter, two-layer memories that are all written without momentum) or "auto", the fastest that
            can run.
        blocks_per_state: blocks (of at most 64 tokens) between two states kept for the backward pass of `chunked`,
            which makes the rest again; None: one, and all is kept where it is little.

    Returns:
        outputs (B, H, T, D) in x's dtype, and the new state, in float32 or wider.

    Raises:
        ValueError: a wrong shape, dtype, device or choice, a chunk size below 1, NaN in a gate's argument.
    """
    if blocks_per_state is not None:
        check_positive("blocks_per_state", blocks_per_state)
    _check_tensors(x, queries, state)
    rule = Rule(
        chunk_size,
        chunk_size if projection_chunk_size is None else projection_chunk_size,
        objective,
        erase,
        step_size,
        read,
        decay_to,
        write,
        _names(adaptive, state),
    )
    width, hidden = x.shape[-1], state.weights["key"][-1].shape[2]
    obstacle = fused.obstacle(state, rule, momentum) or widths_obstacle(D=width, N=hidden)
    backend = chosen(backend, x, obstacle)
    dtype = state_dtype(x.dtype)
    scalars = (
        _per_head("eta_max", eta_max, x.shape[1], x, dtype),
        _per_head("eta_bias", eta_bias, x.shape[1], x, dtype),
        _per_head("alpha_bias", alpha_bias, x.shape[1], x, dtype),
    )
    mu = _momentum(momentum, x, dtype)
    with torch.autocast(x.device.type, enabled=False):
        state = state.map(lambda layer: layer.to(dtype))
        if backend == "triton":
            return fused.self_modifying_scan(x, queries, state, rule, *scalars)
        args = (x.to(dtype), queries.to(dtype), state, rule, *scalars, mu)
        if backend == "reference":
            outputs, state = reference.self_modifying_scan(*args)
        else:
            outputs, state = chunked.self_modifying_scan(*args, blocks_per_state)
    return outputs.to(x.dtype), state


def memory_gates(
    x: Tensor,
    state: MemoryState,
    eta_max: float | Tensor = 1.0,
    eta_bias: float | Tensor = 0.0,
    alpha_bias: float | Tensor = 4.0,
) -> tuple[Tensor, Tensor]:
    """eta and alpha (B, H, T) that the tokens x (B, H, T, D) get from the state's snapshots; x within one chunk."""
    dtype = state_dtype(x.dtype)
    snapshots = state.map(lambda layer: layer.to(dtype)).snapshots
    raw_eta, raw_alpha = (apply_memory(name, snapshots[name], x.to(dtype)).squeeze(-1) for name in ("eta", "alpha"))
    limit, eta_shift, alpha_shift = (
        _per_head(name, value, x.shape[1], x, dtype)[:, None]
        for name, value in (("eta_max", eta_max), ("eta_bias", eta_bias), ("alpha_bias", alpha_bias))
    )
    return limit * torch.sigmoid(raw_eta + eta_shift), torch.sigmoid(raw_alpha + alpha_shift)


def _momentum(momentum: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """mu of each head (H,); None for 0: without momentum a layer's form is simpler, and the state has no S to carry."""
    if isinstance(momentum, int | float) and momentum == 0:
        return None
    mu = _per_head("momentum", momentum, x.shape[1], x, dtype)
    if not bool(((mu >= 0) & (mu < 1)).all()):
        raise ValueError(f"momentum: got {momentum}, needs values in [0, 1)")
    return mu


def _names(adaptive: Collection[str] | None, state: MemoryState) -> tuple[str, ...]:
    """The names of the memories that are written, in the order of `ALL_MEMORIES`."""
    known = [name for name in ALL_MEMORIES if name in state.weights]
    if adaptive is None:
        return tuple(known)
    if isinstance(adaptive, str) or not set(adaptive) <= set(known):
        raise ValueError(f"adaptive: got {adaptive!r}, needs a collection of names among {', '.join(known)}, or None")
    return tuple(name for name in known if name in adaptive)


def _per_head(name: str, value: float | Tensor, heads: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float):
            raise ValueError(f"{name}: got {type(value).__name__}, needs a number or a tensor of shape (H,)")
        value = torch.full((heads,), float(value), dtype=dtype, device=x.device)
    check_shape(name, value, (heads,), "a number or (H,)")
    check_same(name, value, x, "x", dtypes=(x.dtype, torch.float32, torch.float64))
    check_no_nan(name, value)
    return value.to(dtype)


def _check_tensors(x: Tensor, queries: Tensor, state: MemoryState) -> None:
    if not isinstance(state, MemoryState):
        raise ValueError(f"state: got {type(state).__name__}, needs a MemoryState; see MemoryState.initial(weights)")
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}, needs a tensor of four axes (B, H, T, D)")
    check_float("x", x)
    check_shape("queries", queries, tuple(x.shape), "(B, H, T, D)")
    check_same("queries", queries, x, "x", dtypes=(x.dtype,))
    batch, heads, _, width = x.shape
    check_weights("state.weights", state.weights)
    first = state.weights["key"][-1]
    where = f"state.weights['key'][{len(state.weights['key']) - 1}]"
    check_shape(where, first, (batch, heads, first.shape[2], width), "(B, H, N, D)")
    for part in ("snapshots", "base"):
        check_weights(f"state.{part}", getattr(state, part), state.weights)
    check_momentum("state.momentum", state.momentum, state.weights)
    check_same("state.weights", first, x, "x", dtypes=(x.dtype, state_dtype(x.dtype)))
    if state.position < 0:
        raise ValueError(f"state.position: got {state.position}, needs at least 0")
