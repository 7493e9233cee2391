"""`titans_scan`: the long-term memory of Titans, an MLP that learns key-value pairs by gradient descent with momentum.

Keys, values and gates come from outside, unlike in `self_modifying_scan`. The inner gradient is taken at the memory of
the last chunk boundary, as Titans does to train in parallel (arXiv:2501.00663, 3.2); momentum and weight decay act
token by token, by the closed form of `nestling.memory.momentum`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import reference
from nestling.memory.backends import chosen
from nestling.memory.checks import (
    check_choice,
    check_float,
    check_no_nan,
    check_positive,
    check_same,
    check_shape,
    state_dtype,
)
from nestling.memory.chunked import blocks
from nestling.memory.momentum import MomentumGates, learn_with_momentum
from nestling.memory.recompute import scan

#: A memory's two layers: w1 (B, H, D, N) and w2 (B, H, N, D).
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class TitansState:
    """What a stream carries from call to call of `titans_scan`; every pair is w1 (B, H, D, N) and w2 (B, H, N, D).

    Attributes:
        weights: the current weights.
        momentum: the decayed sum of the scaled gradients of each layer, minus the paper's S.
        snapshot: the weights at the last chunk boundary.
        base: the weights before the first token (`decay_to="initial"` decays towards them).
        position: tokens consumed so far.
    """

    weights: Pair
    momentum: Pair
    snapshot: Pair
    base: Pair
    position: int = 0

    @classmethod
    def initial(cls, weights: Pair) -> TitansState:
        """A fresh state that starts from `weights` (w1, w2): no momentum, position 0.

        Raises:
            ValueError: not two tensors whose shape, dtype and device fit each other.
        """
        _check_pair("weights", weights)
        w1, w2 = weights
        return cls((w1, w2), (torch.zeros_like(w1), torch.zeros_like(w2)), (w1, w2), (w1, w2), 0)

    def detach(self) -> TitansState:
        """The same numbers cut off from the graph that made them (truncated backpropagation through time)."""
        return self._map(torch.Tensor.detach)

    def to(self, dtype: torch.dtype) -> TitansState:
        return self._map(lambda tensor: tensor.to(dtype))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TitansState:
        weights, momentum, snapshot, base = (
            (function(w1), function(w2)) for w1, w2 in (self.weights, self.momentum, self.snapshot, self.base)
        )
        return TitansState(weights, momentum, snapshot, base, self.position)


def titans_scan(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    log_mu: Tensor,
    state: TitansState,
    *,
    chunk_size: int = 64,
    read: str = "after",
    decay_to: str = "zero",
    backend: str = "auto",
    blocks_per_state: int | None = None,
) -> tuple[Tensor, TitansState]:
    """Read a sequence with a two-layer memory that learns `M(k_t) = v_t` while it reads.

    With `M(z) = z + w1 silu(w2 z)` and g_t the gradient of `1/2 |M(k_t) - v_t|^2` at the memory of the last chunk
    boundary (a multiple of `chunk_size`, counted from `state.position` 0), each layer moves by
    `S_t = mu_t S_{t-1} - theta_t g_t`, `W_t = base + alpha_t (W_{t-1} - base) + S_t` (arXiv:2501.00663, Eq. 9-14, whose
    alpha is `1 - alpha_t` here). `chunk_size=1` is the paper's online rule. Any split of the tokens into calls gives
    the same result; rows of the batch never touch each other; differentiable in every tensor, through the writes.

    Args:
        keys, values, queries: (B, H, T, D).
        log_alpha: (B, H, T), log of the share of the memory that a token keeps, float32 or wider.
        theta: (B, H, T), step size, float32 or wider.
        log_mu: (B, H, T), log of the momentum's decay, float32 or wider; -inf is no momentum.
        state: the memory; `TitansState.initial((w1, w2))` makes a fresh one.
        chunk_size: tokens per snapshot.
        read: the memory that token t reads: "after" its own write (the paper's M_t), "before" it, or at the "boundary".
        decay_to: the base: "zero" (the paper's) or the "initial" weights of the state.
        backend: "reference" (token loop), "chunked" (matrix products) or "auto".
        blocks_per_state: blocks (of at most 64 tokens) between two states kept for the backward pass of `chunked`,
            which makes the rest again; None: one, and all is kept where it is little.

    Returns:
        outputs (B, H, T, D) in the inputs' dtype, and the new state, in float32 or wider.

    Raises:
        ValueError: a wrong shape, dtype, device or choice, a chunk size below 1, NaN in a gate.
    """
    check_positive("chunk_size", chunk_size)
    if blocks_per_state is not None:
        check_positive("blocks_per_state", blocks_per_state)
    check_choice("read", read, ("before", "after", "boundary"))
    check_choice("decay_to", decay_to, ("zero", "initial"))
    _check_tensors(keys, values, queries, log_alpha, theta, log_mu, state)
    backend = chosen(backend, keys, "titans_scan has no fused kernels")
    dtype = state_dtype(keys.dtype)
    with torch.autocast(keys.device.type, enabled=False):
        k, v, q, log_gate, step, log_carry = (
            tensor.to(dtype) for tensor in (keys, values, queries, log_alpha, theta, log_mu)
        )
        args = (k, v, q, log_gate, step, log_carry, state.to(dtype), chunk_size, read, decay_to)
        if backend == "reference":
            outputs, state = reference.titans_scan(*args)
        else:
            outputs, state = _chunked(*args, blocks_per_state)
    return outputs.to(keys.dtype), state


def _chunked(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    log_mu: Tensor,
    state: TitansState,
    chunk_size: int,
    read: str,
    decay_to: str,
    blocks_per_state: int | None,
) -> tuple[Tensor, TitansState]:
    tokens = keys.shape[2]
    if tokens == 0:
        return torch.empty_like(values), state
    spans = list(blocks(state.position, tokens, {chunk_size}))

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs, weights, momentum = _block(inputs, carry, constants, read)
        boundary = (state.position + spans[block][1]) % chunk_size == 0
        return outputs, (*weights, *momentum, *(weights if boundary else carry[4:]))

    bases = state.base if decay_to == "initial" else (None, None)
    inputs = (keys, values, queries, *(gate.unsqueeze(-1) for gate in (log_alpha, theta, log_mu)))
    carry = (*state.weights, *state.momentum, *state.snapshot)
    outputs, (w1, w2, s1, s2, f1, f2) = scan(body, spans, carry, inputs, bases, blocks_per_state)
    after = replace(state, weights=(w1, w2), momentum=(s1, s2), snapshot=(f1, f2), position=state.position + tokens)
    return outputs, after


def _block(inputs: tuple, carry: tuple, bases: tuple, read: str) -> tuple[Tensor, Pair, Pair]:
    """One block of C tokens (B, H, C, D): outputs (B, H, C, D), the two layers and their momenta after it."""
    k, v, q, log_alpha, theta, log_mu = (stream.mT for stream in inputs)
    w1, w2, s1, s2, frozen1, frozen2 = carry
    pre = frozen2 @ k
    h, sigmoid = F.silu(pre), torch.sigmoid(pre)
    delta1 = theta * (k + frozen1 @ h - v)
    delta2 = (frozen1.mT @ delta1) * sigmoid * (1 + pre * (1 - sigmoid))

    gates, step, inclusive = MomentumGates(log_alpha, log_mu), torch.ones_like(theta), read == "after"
    evolving = None if read == "boundary" else q
    w2, s2, pre_q = learn_with_momentum(w2, s2, bases[1], k, delta2, step, evolving, gates, False, inclusive)
    h_q = None if pre_q is None else F.silu(pre_q)
    w1, s1, inner = learn_with_momentum(w1, s1, bases[0], h, delta1, step, h_q, gates, False, inclusive)
    if inner is None:
        inner = frozen1 @ F.silu(frozen2 @ q)
    return (q + inner).mT, (w1, w2), (s1, s2)


def _check_pair(name: str, pair: Pair, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless `pair` is (w1, w2) of one memory, w2 of `shape` (B, H, N, D) if given."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(w, Tensor) for w in pair):
        raise ValueError(f"{name}: got {type(pair).__name__}, needs a pair of tensors (w1, w2)")
    w1, w2 = pair
    if shape is None:
        shape = tuple(w2.shape) if w2.dim() == 4 else (-1,) * 4
    check_shape(f"{name}[1]", w2, shape, "(B, H, N, D)")
    check_float(f"{name}[1]", w2)
    check_shape(f"{name}[0]", w1, (*shape[:2], shape[3], shape[2]), "(B, H, D, N)")
    check_same(f"{name}[0]", w1, w2, f"{name}[1]", dtypes=(w2.dtype,))


def _check_tensors(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    log_mu: Tensor,
    state: TitansState,
) -> None:
    if not isinstance(state, TitansState):
        raise ValueError(f"state: got {type(state).__name__}, needs a TitansState; see TitansState.initial(weights)")
    if not isinstance(keys, Tensor) or keys.dim() != 4:
        got = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
        raise ValueError(f"keys: got {got}, needs a tensor of four axes (B, H, T, D)")
    check_float("keys", keys)
    for name, tensor in (("values", values), ("queries", queries)):
        check_shape(name, tensor, tuple(keys.shape), "(B, H, T, D)")
        check_same(name, tensor, keys, "keys", dtypes=(keys.dtype,))
    for name, tensor in (("log_alpha", log_alpha), ("theta", theta), ("log_mu", log_mu)):
        check_shape(name, tensor, tuple(keys.shape[:3]), "(B, H, T)")
        check_same(name, tensor, keys, "keys", dtypes=(torch.float32, torch.float64))
        check_no_nan(name, tensor)
    batch, heads, _, width = keys.shape
    _check_pair("state.weights", state.weights)
    w2 = state.weights[1]
    shape = (batch, heads, w2.shape[2], width)
    check_shape("state.weights[1]", w2, shape, "(B, H, N, D)")
    for part in ("momentum", "snapshot", "base"):
        _check_pair(f"state.{part}", getattr(state, part), shape)
    check_same("state.weights", w2, keys, "keys", dtypes=(keys.dtype, state_dtype(keys.dtype)))
    if state.position < 0:
        raise ValueError(f"state.position: got {state.position}, needs at least 0")
