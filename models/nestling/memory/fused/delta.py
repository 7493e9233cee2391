"""`delta_scan` by Triton: two custom operators around the kernels, and what they leave to torch.

A base that the gates decay towards is taken out before the kernels and put back behind them, as everything is linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.memory.fused.launch import on_device, padded, precision, tile
from nestling.memory.layer import SHUT

#: Tokens of a chunk of the kernels.
CHUNK = 64


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
) -> tuple[Tensor, Tensor]:
    """As `nestling.memory.delta_scan`, of arguments that were checked; the final weights are float32."""
    dtype, initial = keys.dtype, initial.float()
    if keys.shape[2] == 0:
        return queries.new_empty(local_grads.shape), initial
    first, moved = initial, local_grads
    if base is not None:
        base = base.float()
        first = initial - base
        if erase:  # W z is (W - base) z and base z
            moved = (moved.float() + keys.float() @ base.mT).to(dtype)
    tensors = (keys, moved, log_alpha.float(), eta.float(), queries, first)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    inner = "none" if read == "boundary" else read
    outputs, final, *_ = _scan(*(tensor.contiguous() for tensor in tensors), erase, inner, keep)
    if read == "boundary":
        outputs = (queries.float() @ initial.mT).to(dtype)
    elif base is not None:
        outputs = (outputs.float() + queries.float() @ base.mT).to(dtype)
    return outputs, final if base is None else final + base


@torch.library.custom_op("nestling::delta_scan", mutates_args=())
def _scan(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    erase: bool,
    read: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final weights, and for the backward pass log b, the inverse of I + L, and the weights of each chunk.

    Args:
        keys, ..., initial: contiguous, of one dtype but for the float32 gates, steps and weights.
        read: "before", "after", or "none": outputs are then empty.
        keep: whether the weights of each chunk are kept.
    """
    from nestling.memory.fused import delta_kernels

    results = _results(keys, local_grads, log_alpha, eta, queries, initial, erase, read, keep)
    outputs, final, total, inverse, states = results
    (batch, heads, tokens, n), m = keys.shape, local_grads.shape[-1]
    rows, given = batch * heads, {"N": n, "NP": padded(n), "ERASE": erase, **precision(keys.dtype)}
    with on_device(keys):
        delta_kernels.prepare[(-(-tokens // CHUNK), rows)](
            *(keys, log_alpha, eta, total, inverse, tokens),
            **given | {"SHUT": SHUT, "PRECISION": "tf32x3", "num_warps": 4},
        )
        shape = tile(m, n, keys.dtype)
        delta_kernels.forward[(-(-m // shape["TILE"]), rows)](
            *(keys, local_grads, queries, eta, total, inverse, initial, outputs, final, states, tokens),
            **given | {"M": m, "READ": read, "KEEP": keep, **shape},
        )
    return results


@_scan.register_fake
def _results(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    erase: bool,
    read: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, n = keys.shape
    chunks = (tokens + CHUNK - 1) // CHUNK
    return (
        torch.empty_like(local_grads) if read != "none" else keys.new_empty(0),
        torch.empty_like(initial),
        log_alpha.new_empty(batch, heads, tokens, dtype=torch.float64),
        log_alpha.new_empty((batch, heads, chunks, CHUNK, CHUNK) if erase else (0,)),
        keys.new_empty((batch, heads, chunks, local_grads.shape[-1], n) if keep else (0,)),
    )


@torch.library.custom_op("nestling::delta_scan_backward", mutates_args=())
def _backward(
    keys: Tensor,
    local_grads: Tensor,
    eta: Tensor,
    queries: Tensor,
    total: Tensor,
    inverse: Tensor,
    states: Tensor,
    grad_outputs: Tensor,
    grad_final: Tensor,
    erase: bool,
    read: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of keys, local_grads, log_alpha, eta, queries and initial."""
    from nestling.memory.fused import delta_kernels

    (batch, heads, tokens, n), m = keys.shape, local_grads.shape[-1]
    rows, shape = batch * heads, tile(m, n, keys.dtype, backward=True)
    parts = -(-m // shape["TILE"])
    grad_local, grad_initial = torch.empty_like(local_grads), torch.empty_like(grad_final)
    grad_keys = eta.new_empty(parts, *keys.shape)
    grad_queries = torch.zeros_like(grad_keys) if read == "none" else torch.empty_like(grad_keys)
    grad_log, grad_eta = (eta.new_empty(parts, *eta.shape) for _ in range(2))
    with on_device(keys):
        delta_kernels.backward[(parts, rows)](
            *(keys, local_grads, queries, eta, total, inverse, states, grad_outputs, grad_final),
            *(grad_keys, grad_local, grad_log, grad_eta, grad_queries, grad_initial, tokens),
            **{"M": m, "N": n, "NP": padded(n), "ERASE": erase, "READ": read, **shape, **precision(keys.dtype)},
        )
    of_keys, of_queries = (grad.sum(0).to(keys.dtype) for grad in (grad_keys, grad_queries))
    return of_keys, grad_local, grad_log.sum(0), grad_eta.sum(0), of_queries, grad_initial


@_backward.register_fake
def _(
    keys: Tensor,
    local_grads: Tensor,
    eta: Tensor,
    queries: Tensor,
    total: Tensor,
    inverse: Tensor,
    states: Tensor,
    grad_outputs: Tensor,
    grad_final: Tensor,
    erase: bool,
    read: str,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (keys, local_grads, eta, eta, queries, grad_final))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    keys, local_grads, log_alpha, eta, queries, _, erase, read, _ = inputs
    ctx.save_for_backward(keys, local_grads, log_alpha, eta, queries, *output[2:])
    ctx.switches = erase, read


def _differentiate(
    ctx: Any, grad_outputs: Tensor | None, grad_final: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    keys, local_grads, log_alpha, eta, queries, total, inverse, states = ctx.saved_tensors
    if grad_outputs is None:
        grad_outputs = torch.zeros_like(local_grads)
    if grad_final is None:
        grad_final = eta.new_zeros(*keys.shape[:2], local_grads.shape[-1], keys.shape[-1])
    tensors = (keys, local_grads, eta, queries, total, inverse, states, grad_outputs, grad_final)
    grads = list(_backward(*(tensor.contiguous() for tensor in tensors), *ctx.switches))
    grads[2] = grads[2].masked_fill(log_alpha < SHUT, 0)
    return *grads, None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)
