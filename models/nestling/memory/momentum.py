"""One linear layer that learns along a block of C tokens with momentum on its gradient, in closed form.

As in `nestling.memory.layer` tokens are columns, a retention gate alpha_t and an erase term may act; here the gradients
delta_t z_t^T of the inner loss also go through a momentum S (arXiv:2512.24695, Table 6; arXiv:2501.00663, Eq. 9-14):

    S_t = mu_t S_{t-1} + delta_t z_t^T
    W_t = alpha_t W_{t-1} - eta_t w_t z_t^T - eta_t S_t        with w_t = W_{t-1} z_t, zero without the erase term

Titans' own momentum, S_t = mu_t S_{t-1} - theta_t grad and W_t = alpha_t W_{t-1} + S_t, is eta = 1, no erase and deltas
scaled by theta; its S has the other sign. With b_t = alpha_1 ... alpha_t and c_t = mu_1 ... mu_t, for s <= t,

    G_st = eta_s b_t / b_s    (what of token s's step is left at t)          K_jt = sum_s (c_s / c_j) G_st, j <= s
    k_t = sum_s c_s G_st      (the same for gradient j, and for S_0)
    w_t = b_{t-1} W_0 z_t - k_{t-1} S_0 z_t - sum_{s<t} (G_s,t-1 w_s + K_s,t-1 delta_s) z_s.z_t   (a triangular system)
    W_t = b_t W_0 - k_t S_0 - sum_{s<=t} (G_st w_s + K_st delta_s) z_s^T
    S_t = c_t S_0 + sum_{j<=t} (c_t / c_j) delta_j z_j^T

A base that the gate decays towards is subtracted before and added after; the momentum never contains it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.layer import SHUT


class MomentumGates:
    """Cumulated retention and momentum inside a block, from log_alpha and log_mu (..., 1, C); every entry is <= 1.

    kept = b_t and carried = c_t (..., 1, C); kept_since[s, t] = b_t / b_s and carried_since[s, t] = c_t / c_s for
    s <= t, zero elsewhere (..., C, C). Differentiable; a gate may be 1, or 0 (its logarithm then has no gradient).
    """

    def __init__(self, log_alpha: Tensor, log_mu: Tensor) -> None:
        self.kept, self.kept_since = _products(log_alpha)
        self.carried, self.carried_since = _products(log_mu)

    def unsqueeze(self, dim: int) -> MomentumGates:
        """The same gates for tensors with one more batch axis."""
        wider = object.__new__(MomentumGates)
        wider.__dict__ = {name: value.unsqueeze(dim) for name, value in self.__dict__.items()}
        return wider


def learn_with_momentum(
    weights: Tensor,
    momentum: Tensor,
    base: Tensor | None,
    keys: Tensor,
    deltas: Tensor,
    step: Tensor,
    queries: Tensor | None,
    gates: MomentumGates,
    erase: bool,
    inclusive: bool,
    reader: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """W_C and S_C (..., m, n) after the block, and what each query reads from the weights of its own token.

    Differentiable by autograd in every tensor.

    Args:
        weights, momentum, base: (B, H, m, n) or (B, H, memories, m, n).
        keys, deltas, step: (..., n, C), (..., m, C) and (..., 1, C).
        queries: (..., n, C) of the part that is read; None: nothing is read.
        gates: of the block, for the same number of axes.
        erase: whether the layer has the erase term.
        inclusive: token t reads W_t; otherwise W_{t-1}.
        reader: the read is of the part [reader:] of axis 2 of the weights.
    """
    if base is not None:
        weights = weights - base
    left = step.mT * gates.kept_since  # G
    lasting = gates.carried_since @ left  # K
    entered = gates.carried @ left  # k

    written = lasting[..., -1:].mT * deltas
    seen = None
    if erase:
        overlap = keys.mT @ keys
        seen = _before(gates.kept, 1.0) * (weights @ keys) - _before(entered) * (momentum @ keys)
        seen = seen - deltas @ (_before(lasting) * overlap)
        if base is not None:
            seen = seen + base @ keys
        triangle = _before(left) * overlap
        seen = torch.linalg.solve_triangular(triangle, seen, upper=True, left=False, unitriangular=True)
        written = written + left[..., -1:].mT * seen
    end = gates.kept[..., -1:] * weights - entered[..., -1:] * momentum - written @ keys.mT
    end_momentum = gates.carried[..., -1:] * momentum + (gates.carried_since[..., -1:].mT * deltas) @ keys.mT

    output = None
    if queries is not None:
        kept = gates.kept
        if not inclusive:
            kept, left, lasting, entered = _before(kept, 1.0), _before(left), _before(lasting), _before(entered)
        part = slice(reader, None)
        own = (slice(None), slice(None), part) if weights.dim() == 5 else ()  # keys are shared unless there are 5 axes
        shared = keys[own].mT @ queries
        output = kept * (weights[:, :, part] @ queries) - _part(entered, own) * (momentum[:, :, part] @ queries)
        output = output - deltas[:, :, part] @ (_part(lasting, own) * shared)
        if seen is not None:
            output = output - seen[:, :, part] @ (_part(left, own) * shared)
        if base is not None:
            output = output + base[:, :, part] @ queries
    return end if base is None else end + base, end_momentum, output


def _products(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Products of gates: from the block's start to t (..., 1, C), and from behind s to t (..., C, C)."""
    # In float64: a sum over shut gates leaves nothing of float32's digits for the differences behind them.
    total = log_gate.clamp(min=SHUT).double().cumsum(dim=-1)
    size = total.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=total.device).tril(-1)
    # Masked before the exponential: what lies in the future may overflow, and infinity has no gradient.
    since = (total - total.mT).to(log_gate.dtype).masked_fill(future, -torch.inf)
    return total.to(log_gate.dtype).exp(), since.exp()


def _before(columns: Tensor, first: float = 0.0) -> Tensor:
    """Column t - 1 in the place of column t, and `first` in the first."""
    return F.pad(columns, (1, -1), value=first)


def _part(ratios: Tensor, own: tuple[slice, ...]) -> Tensor:
    """Of ratios that differ between memories (their steps do), those of the memories that are read."""
    return ratios[own] if own and ratios.shape[2] > 1 else ratios
