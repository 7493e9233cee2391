"""One linear layer that learns along a block of C tokens, in closed form, with the backward pass written out.

Tokens are columns (the last axis), so that the hidden units of five memories are one axis or two without a copy. With
weights W_0 (m, n) at the block's start, keys Z (n, C), local gradients Delta (m, C), steps eta and gates alpha (1, C),
`W_t = alpha_t W_{t-1} - y_t p_t^T`, where y_t = W_{t-1} z_t + delta_t is what the layer sees at token t and
p_t = eta_t z_t the key that it writes. All y_t solve one unit triangular system (the WY form of a product of
Householder-like factors, arXiv:2406.06484; the retention gate as in arXiv:2412.06464). With b_t = alpha_1 ... alpha_t:

    Y (I + S) = b_{t-1} W_0 Z + Delta,   S_st = (b_{t-1} / b_s) p_s . z_t for s < t
    W_C = b_C W_0 - Y (b_C / b_t P)^T
    O = c_t W_0 Q - Y V,   V_st = (c_t / b_s) p_s . q_t for s < t and c_t = b_{t-1} (or for s <= t and c_t = b_t)

Without the erase term Y is Delta. A base that the gate decays towards is subtracted before and added after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: log(alpha) below this is a gate that is shut: its exponential is nothing beside 1, and infinity is kept out.
SHUT = -100.0


class Gates:
    """Cumulated retention inside a block, from log_alpha (..., 1, C); only ratios of later to earlier gates, all <= 1.

    total = log b_t, previous = log b_{t-1} and reading = log c_t (..., 1, C) carry the gradient; the others do not:
    before = b_{t-1}, rest = b_C / b_t (..., 1, C), end = b_C (..., 1, 1), decay = c_t,
    earlier[s, t] = b_{t-1} / b_s for s < t, ratio[s, t] = c_t / b_s where the read sees s (..., C, C), zero elsewhere.
    """

    def __init__(self, log_alpha: Tensor, inclusive: bool) -> None:
        log_alpha = log_alpha.clamp(min=SHUT)
        self.total = log_alpha.cumsum(dim=-1)
        self.previous = self.total - log_alpha
        self.reading = self.total if inclusive else self.previous
        with torch.no_grad():
            # In float64: a sum over shut gates leaves nothing of float32's digits for the differences behind them.
            dtype, exact = log_alpha.dtype, log_alpha.double()
            total = exact.cumsum(dim=-1)
            previous, last = total - exact, total[..., -1:]
            self.before, self.rest, self.end = (t.exp().to(dtype) for t in (previous, last - total, last))
            # The exponents that are masked away may overflow.
            self.earlier = (previous - total.mT).to(dtype).exp().triu(1)
            self.decay, self.ratio = self.before, self.earlier
            if inclusive:
                self.decay, self.ratio = total.exp().to(dtype), (total - total.mT).to(dtype).exp().triu()

    def unsqueeze(self, dim: int) -> Gates:
        """The same gates for tensors with one more batch axis."""
        wider = object.__new__(Gates)
        wider.__dict__ = {name: value.unsqueeze(dim) for name, value in self.__dict__.items()}
        return wider


def learn(
    weights: Tensor,
    base: Tensor | None,
    keys: Tensor,
    deltas: Tensor,
    step: Tensor,
    queries: Tensor | None,
    gates: Gates,
    erase: bool,
    reader: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The weights W_C (..., m, n) after the block, and what each query reads from the weights of its own token.

    Args:
        weights, base: (B, H, m, n) or (B, H, memories, m, n).
        keys, deltas, step: (..., n, C), (..., m, C) and (..., 1, C).
        queries: (..., n, C) of the part that is read; None: nothing is read.
        gates: of the block, for the same number of axes.
        erase: whether the layer has the erase term.
        reader: the read is of the part [reader:] of axis 2 of the weights.
    """
    if base is not None:
        weights = weights - base
        deltas = deltas + base @ keys if erase else deltas
    logs = gates.total, gates.previous, gates.reading
    end, output = _Learn.apply(weights, keys, deltas, step, queries, *logs, gates, erase, reader)
    if base is not None:
        end = end + base
        if queries is not None:
            output = output + base[:, :, reader:] @ queries
    return end, output


class _Learn(torch.autograd.Function):
    """(weights, keys, deltas, step, queries, log gates) -> (W_C, outputs)."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        keys: Tensor,
        deltas: Tensor,
        step: Tensor,
        queries: Tensor | None,
        total: Tensor,
        previous: Tensor,
        reading: Tensor,
        gates: Gates,
        erase: bool,
        reader: int,
    ) -> tuple[Tensor, Tensor | None]:
        written = step * keys
        overlap, seen = None, deltas
        if erase:
            overlap = (written.mT @ keys).mul_(gates.earlier)
            seen = (weights @ keys).mul_(gates.before).add_(deltas)
            seen = _solve(overlap, seen, upper=True)
        left = -gates.rest * written
        end = torch.addcmul(seen @ left.mT, gates.end, weights)
        shares = outputs = None
        if queries is not None:
            shares = (_part(written, weights, reader).mT @ queries).mul_(gates.ratio)
            outputs = (weights[:, :, reader:] @ queries).mul_(gates.decay).sub_(seen[:, :, reader:] @ shares)
        ctx.save_for_backward(weights, keys, step, queries, written, overlap, seen, left, end, shares)
        ctx.gates, ctx.reader = gates, reader
        return end, outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_end: Tensor, grad_outputs: Tensor | None) -> Any:
        weights, keys, step, queries, written, overlap, seen, left, end, shares = ctx.saved_tensors
        gates, reader = ctx.gates, ctx.reader

        # W_C = b_C W_0 - Y (b_C / b_t P)^T
        grad_weights = gates.end * grad_end
        grad_seen = grad_end @ left
        grad_written = (grad_end.mT @ seen).mul_(-gates.rest)

        # O = c_t W_0 Q - Y V
        grad_queries = grad_reading = None
        if queries is not None:
            decayed = gates.decay * grad_outputs
            grad_shares = (seen[:, :, reader:].mT @ grad_outputs).mul_(gates.ratio)
            grad_queries = (weights[:, :, reader:].mT @ decayed).sub_(_part(written, weights, reader) @ grad_shares)
            grad_reading = _dot(queries, grad_queries)
            grad_weights[:, :, reader:] += decayed @ queries.mT
            grad_seen[:, :, reader:] -= grad_outputs @ shares.mT
            _part(grad_written, weights, reader).sub_(queries @ grad_shares.mT)

        # Y (I + S) = b_{t-1} W_0 Z + Delta
        grad_keys = grad_previous = None
        if overlap is not None:
            grad_seen = _solve(overlap.mT, grad_seen, upper=False)
            recalled = gates.before * grad_seen
            grad_overlap = (seen.mT @ grad_seen).mul_(gates.earlier)
            grad_keys = (weights.mT @ recalled).sub_(written @ grad_overlap)
            grad_previous = _dot(keys, grad_keys).sum_to_size(gates.total.shape)
            grad_weights += recalled @ keys.mT
            grad_written -= keys @ grad_overlap.mT

        # A gate only ever scales a vector, so the gradient of its logarithm is that vector times its gradient: c_t the
        # query, b_{t-1} the key that erases, 1 / b_t the key that is written, b_C the weights at the end.
        grad_step = _dot(keys, grad_written)
        grad_total = -step * grad_step
        grad_total[..., -1:] += (end * grad_end).sum(dim=(-2, -1), keepdim=True)
        grad_total, grad_step = grad_total.sum_to_size(gates.total.shape), grad_step.sum_to_size(step.shape)
        grad_keys = step * grad_written if grad_keys is None else grad_keys.addcmul_(step, grad_written)
        logs = grad_total, grad_previous, grad_reading
        return grad_weights, grad_keys, grad_seen, grad_step, grad_queries, *logs, None, None, None


def _part(keys: Tensor, weights: Tensor, reader: int) -> Tensor:
    """The keys of the part that is read: memories have keys of their own in w1, and share them in w2."""
    return keys[:, :, reader:] if weights.dim() == 5 else keys


def _solve(triangle: Tensor, right: Tensor, upper: bool) -> Tensor:
    """X with X (I + triangle) = right."""
    return torch.linalg.solve_triangular(triangle, right, upper=upper, left=False, unitriangular=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Products of the columns: (..., n, C) twice to (..., 1, C)."""
    return (left * right).sum(dim=-2, keepdim=True)
