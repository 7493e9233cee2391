"""`delta_scan`: one linear layer as a Delta-Gradient-Descent memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory import chunked, reference
from nestling.memory.backends import chosen, widths_obstacle
from nestling.memory.checks import (
    check_choice,
    check_float,
    check_no_nan,
    check_positive,
    check_same,
    check_shape,
    state_dtype,
)


def delta_scan(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    *,
    base: Tensor | None = None,
    erase: bool = True,
    read: str = "before",
    backend: str = "auto",
    blocks_per_state: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a linear layer over a sequence while every token updates it.

    `W_t = base + alpha_t (W_{t-1} - base) - eta_t (W_{t-1} z_t) z_t^T - eta_t delta_t z_t^T`, row of the batch by row
    and head by head (Delta Gradient Descent with a retention gate, arXiv:2512.24695, Eq. 57 and 88). Differentiable in
    every tensor; nothing is changed in place.

    Args:
        keys: (B, H, T, n), the layer's input z_t at each token.
        local_grads: (B, H, T, m), gradient delta_t of the inner loss at the layer's output.
        log_alpha: (B, H, T), log of the retention gate, float32 or wider.
        eta: (B, H, T), step size, float32 or wider.
        queries: (B, H, T, n), what is read.
        initial: (B, H, m, n), the weights before the first token, in the inputs' dtype or the state's.
        base: (B, H, m, n), what the gate decays towards; None is zero.
        erase: keep the term `- eta_t (W_{t-1} z_t) z_t^T`; False is plain gradient descent.
        read: "before" reads W_{t-1} q_t, "after" W_t q_t, "boundary" initial q_t.
        backend: "reference" (token loop), "chunked" (matrix products), "triton" (fused kernels: CUDA, widths 16 to 256,
            float32 or shorter) or "auto", the fastest that can run.
        blocks_per_state: blocks of 64 tokens between two states kept for the backward pass of `chunked`, which
            makes the rest again; None: one, and all is kept where it is little.

    Returns:
        outputs (B, H, T, m) in the inputs' dtype, and W_T (B, H, m, n) in float32 or wider.

    Raises:
        ValueError: a wrong shape, dtype, device, choice, or NaN in `log_alpha` or `eta`.
    """
    if not isinstance(erase, bool):
        raise ValueError(f"erase: got {erase!r}, needs True or False")
    check_choice("read", read, ("before", "after", "boundary"))
    if blocks_per_state is not None:
        check_positive("blocks_per_state", blocks_per_state)
    _check_tensors(keys, local_grads, log_alpha, eta, queries, initial, base)
    backend = chosen(backend, keys, widths_obstacle(n=keys.shape[-1], m=local_grads.shape[-1]))

    dtype = state_dtype(keys.dtype)
    with torch.autocast(keys.device.type, enabled=False):
        if backend == "triton":
            from nestling.memory.fused.delta import delta_scan as fused

            return fused(keys, local_grads, log_alpha, eta, queries, initial, base, erase, read)
        z, delta, log_gate, step, q, first = (
            tensor.to(dtype) for tensor in (keys, local_grads, log_alpha, eta, queries, initial)
        )
        args = (z, delta, log_gate, step, q, first, None if base is None else base.to(dtype), erase, read)
        if backend == "reference":
            outputs, final = reference.delta_scan(*args)
        else:
            outputs, final = chunked.delta_scan(*args, blocks_per_state)
    return outputs.to(keys.dtype), final


def _check_tensors(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    base: Tensor | None,
) -> None:
    for name, tensor in (("keys", keys), ("local_grads", local_grads)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: got {got}, needs a tensor of four axes (B, H, T, width)")
    check_float("keys", keys)
    batch, heads, tokens, n = keys.shape
    m = local_grads.shape[-1]
    check_shape("local_grads", local_grads, (batch, heads, tokens, m), "(B, H, T, m)")
    check_shape("queries", queries, (batch, heads, tokens, n), "(B, H, T, n)")
    check_shape("initial", initial, (batch, heads, m, n), "(B, H, m, n)")
    for name, tensor in (("local_grads", local_grads), ("queries", queries)):
        check_same(name, tensor, keys, "keys", dtypes=(keys.dtype,))
    weights = [("initial", initial)]
    if base is not None:
        check_shape("base", base, (batch, heads, m, n), "(B, H, m, n)")
        weights.append(("base", base))
    for name, tensor in weights:
        check_same(name, tensor, keys, "keys", dtypes=(keys.dtype, state_dtype(keys.dtype)))
    for name, tensor in (("log_alpha", log_alpha), ("eta", eta)):
        check_shape(name, tensor, (batch, heads, tokens), "(B, H, T)")
        check_same(name, tensor, keys, "keys", dtypes=(torch.float32, torch.float64))
        check_no_nan(name, tensor)
