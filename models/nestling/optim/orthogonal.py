"""Rules that orthogonalise momenta: Muon, and M3 (Multi-scale Momentum Muon; arXiv:2512.24695, Algorithm 1, Eq. 75)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestling.optim.matrices import Whole
from nestling.optim.rules import State, buffer

#: Coefficients of the quintic; it takes singular values to about [0.7, 1.2] in five steps, not to exactly 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
MODES = ("ema", "literal", "adamuon")


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Nearly the orthogonal polar factor of each matrix (..., rows, columns), by `steps` of the quintic iteration.

    Starts from M / (|M|_F + 1e-7) and multiplies on the smaller side (arXiv:2512.24695, Eq. 42-44; Jordan et al. 2024).
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    x = (wide / (wide.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)).reshape(-1, *wide.shape[-2:])
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b A + c A^2) X
    x = x.view(wide.shape)
    return x.mT if tall else x


def muon(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """Momentum, orthogonalised (Jordan et al. 2024; arXiv:2512.24695, Eq. 42 and 52).

    Scaled by 0.2 sqrt(max(rows, columns)), so that its elements are about as large as AdamW's and one learning rate
    does for both (Liu et al. 2025, arXiv:2502.16982).
    """
    momentum = buffer(state, "momentum", parameter).lerp_(gradient, 1 - group["momentum"])
    direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def scaled(matrix: Tensor) -> Tensor:
        return newton_schulz(matrix, group["ns_steps"]) * (0.2 * max(matrix.shape[-2:]) ** 0.5)

    change = whole(parameter, scaled, direction)
    return change.add_(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])


def m3(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """M3: a fast and a slow momentum, both orthogonalised, over the root of a second moment; see `nestling.optim.M3`.

    The slow momentum takes in the sum (mean) of a block of gradients when the next block begins; its orthogonalised
    direction is kept for the block, and is zero before that.
    """
    fast, second, block, slow, direction = (
        buffer(state, name, parameter) for name in ("fast", "second", "block", "slow", "direction")
    )
    (beta1, beta2, beta3), literal = group["betas"], group["mode"] == "literal"
    orthogonal = partial(newton_schulz, steps=group["ns_steps"])
    done = state["updates"] - 1
    if done and done % group["slow_period"] == 0:
        if literal:
            slow.add_(block, alpha=beta3)
        else:
            slow.lerp_(block / group["slow_period"], 1 - beta3)
        direction.copy_(whole(parameter, orthogonal, slow))
        block.zero_()
    block.add_(gradient)
    fast.add_(gradient, alpha=beta1) if literal else fast.lerp_(gradient, 1 - beta1)
    change = whole(parameter, orthogonal, fast)
    seen = change if group["mode"] == "adamuon" else gradient
    second.mul_(1 if literal else beta2).addcmul_(seen, seen, value=beta2 if literal else 1 - beta2)
    root = second.sqrt() if literal else (second / (1 - beta2 ** state["updates"])).sqrt_()
    change.add_(direction, alpha=group["slow_weight"]).div_(root.add_(group["eps"]))
    return change.add_(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])
