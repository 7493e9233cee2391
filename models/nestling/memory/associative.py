"""Learning rules of associative memories, one step each, to be read beside the paper (arXiv:2512.24695, Section 5).

A memory is an operator M and an objective that says how well it maps keys to values (Definition 1, Eq. 6). For a matrix
M (..., m, n) and one gradient step each objective gives the rule of a known model. The rules are here as equations:
models run whole sequences by `nestling.memory.delta_scan`, and softmax attention, the memory without parameters
(Eq. 62-63), is `nestling.models.attention.attend`.

A key k is (..., n), a value v (..., m), steps and gates are (...,). A feature map is applied by the caller: give phi(k)
for k. The gate alpha scales what was stored, as weight decay does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.memory.reference import delta_step, mv


def hebbian(memory: Tensor, key: Tensor, value: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """alpha M + eta v k^T: a step on -<M k, v> (Eq. 5, 15-18, 64), the rule of linear attention.

    With a layer's input for k and minus the gradient at its output for v this is backpropagation (Eq. 8-9, 30-31).
    """
    return delta_step(memory, key, -value, alpha, eta, 0.0, erase=False)


def delta(memory: Tensor, key: Tensor, value: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """M (alpha I - eta k k^T) + eta v k^T: a step on 1/2 |M k - v|^2 (Eq. 65).

    As of Eq. 88 the gate is on the identity alone; Gated DeltaNet's is on the whole bracket.
    """
    return delta_step(memory, key, -value, alpha, eta, 0.0, erase=True)


def oja(memory: Tensor, key: Tensor, value: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """alpha M + eta v (k - M^T v)^T: a step of eta / 2 on -2 <M k, v> + |M^T v|^2 (Eq. 66-67)."""
    return hebbian(memory, key - mv(memory.mT, value), value, eta, alpha)


def omega(memory: Tensor, keys: Tensor, values: Tensor, gamma: Tensor, alpha: Tensor) -> Tensor:
    """alpha M - sum_i gamma_i (M k_i - v_i) k_i^T: a step on the weighted sum of 1/2 |M k_i - v_i|^2 (Eq. 68).

    With transformed gradients for keys and gradients for values M is a preconditioner that is learned (Eq. 40-41).

    Args:
        memory: (..., m, n).
        keys, values: (..., c, n) and (..., c, m), the last c pairs.
        gamma: (..., c), the step for each.
        alpha: (...,).
    """
    errors = memory @ keys.mT - values.mT
    return alpha[..., None, None] * memory - (gamma.unsqueeze(-2) * errors) @ keys


def delta_gradient_descent(weights: Tensor, inputs: Tensor, local_grad: Tensor, eta: Tensor) -> Tensor:
    """argmin_W 1/2 |W x + grad_y L|^2 + |W - W_t|^2 / (2 eta), in closed form for x of any norm (Eq. 56-57, 113).

    W_t (I - eta' x x^T) - eta' grad_y L x^T with eta' = eta / (1 + eta |x|^2). The step that the paper gives is for
    |x| = 1. The layer itself makes the value that it stores, minus the gradient at its output (Eq. 58): this is the
    member of generalised gradient descent (Definition 5, Eq. 59-60) with the L2 objective.
    """
    proximal = eta / (1 + eta * inputs.square().sum(-1))
    return delta(weights, inputs, -local_grad, proximal, torch.ones_like(eta))
