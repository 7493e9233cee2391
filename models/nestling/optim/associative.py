"""Optimizers as associative memories of gradients, as equations (arXiv:2512.24695, Section 4 and Appendix B).

What the paper derives but no optimizer of `COMPONENTS` runs as it is written: with the rules that do run (momentum,
delta momentum, deep momentum, Muon, M3) these are all of Section 4. A gradient g is the key that a momentum m learns;
W <- W + m follows. Matrices are (..., rows, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor


def preconditioned_momentum(
    momentum: Tensor, gradient: Tensor, preconditioner: Tensor, eta: float, alpha: float
) -> Tensor:
    """alpha m - eta P g: a step on <m g^T, P>, the momentum that maps gradients to values P (rows, rows) (Eq. 46-47).

    P = I is the usual momentum (Eq. 33-34). With phi(g), a feature map of the gradient, for g it is Eq. 51.
    """
    return alpha * momentum - eta * (preconditioner @ gradient)


def orthogonality_step(orthogonal: Tensor, gradient: Tensor, zeta: float) -> Tensor:
    """O - zeta (O - g + 2 O (O^T O - I)): a step on 1/2 |O^T O - I|_F^2 + 1/2 |O - g|_F^2, from O = g on (Eq. 43-44).

    The printed objective has neither the halves nor the second term, which its gradient has. Without that term, zeta =
    1/4 is the cubic Newton-Schulz step 3/2 O - 1/2 O O^T O; `nestling.optim.newton_schulz` takes Muon's quintic.
    """
    gram = orthogonal.mT @ orthogonal
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return orthogonal - zeta * (orthogonal - gradient + 2 * orthogonal @ (gram - identity))


def elementwise_memory(gradients: Tensor, value: Tensor, ridge: float) -> Tensor:
    """argmin_m sum_i |m * g_i - P|^2 + ridge |m|^2 = P sum_i g_i / (sum_i g_i^2 + ridge), elementwise (Eq. 100-105).

    P = sum_i g_i^2 gives the momentum (Eq. 104), P = sqrt(sum_i g_i^2) Adam's direction (Eq. 105): Adam is the best
    memory that maps gradients to their size. The sums are plain; Adam's decay, `adamw` does.

    Args:
        gradients: (t, *shape).
        value: P of that shape.
        ridge: lambda; 0 where every element has had a gradient.
    """
    return value * gradients.sum(0) / (gradients.square().sum(0) + ridge)


def matrix_memory(gradients: Tensor, ridge: float) -> Tensor:
    """(sum_i g_i g_i^T + ridge)^-1/2 sum_i g_i for gradients (t, n) as vectors: AdaGrad with momentum (Eq. 106-111).

    With H = sum_i g_i g_i^T + ridge and P = H^1/2 it is P n, where n = argmin_n sum_i (n.g_i - 1)^2 + ridge |n|^2. The
    printed objective has P inside, where shapes do not fit; its solution, Eq. 107-111, is this one. Shampoo and SOAP
    approximate H^-1/2. H has to be positive definite: a ridge, or t >= n independent gradients.
    """
    sizes, directions = torch.linalg.eigh(gradients.mT @ gradients)
    sizes = sizes + ridge
    return directions @ (sizes.rsqrt() * (directions.mT @ gradients.sum(0)))
