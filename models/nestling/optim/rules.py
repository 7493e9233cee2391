"""Rules that work element by element: AdamW, gradient descent, and the deep momentum (arXiv:2512.24695, Eq. 50).

A rule maps a gradient to the change of its parameter. It keeps its entries in `state` (one dict a parameter): numbers,
and tensors of the parameter's shape, so that the state is sharded and saved like the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.optim.matrices import Whole

State = dict[str, Any]


def buffer(state: State, name: str, parameter: Tensor) -> Tensor:
    """The state tensor `name`, zero at first."""
    if name not in state:
        state[name] = torch.zeros_like(parameter)
    tensor: Tensor = state[name]
    return tensor


def adamw(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """AdamW (Loshchilov & Hutter 2019), the memory of Eq. 100-105 with decay.

    `state["updates"]` counts from 1 and corrects the bias of both averages.
    """
    beta1, beta2 = group["betas"][:2]
    average = buffer(state, "exp_avg", parameter).lerp_(gradient, 1 - beta1)
    square = buffer(state, "exp_avg_sq", parameter).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    mean = average / (1 - beta1 ** state["updates"])
    root = (square / (1 - beta2 ** state["updates"])).sqrt_().add_(group["eps"])
    return mean.div_(root).add_(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])


def descent(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """Gradient descent (Eq. 1, 8, 30) with decoupled weight decay."""
    return gradient.add(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])


def sgd(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """Gradient descent with momentum `group["momentum"]` (Eq. 10-11, 33) and decoupled weight decay."""
    if group["momentum"]:
        gradient = buffer(state, "momentum", parameter).mul_(group["momentum"]).add_(gradient)
    return descent(parameter, gradient, state, group, whole)


def deep_momentum(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """A momentum that is a two-layer MLP a coordinate (Eq. 50); see `nestling.optim.DeepMomentum`."""
    beta1, beta2 = group["betas"]
    square = buffer(state, "exp_avg_sq", parameter).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    key = gradient / (square / (1 - beta2 ** state["updates"])).sqrt_().add_(group["eps"])
    change = parameter * group["weight_decay"]
    for unit, slope in enumerate(initial_slopes(group["hidden"])):
        out, turn = (buffer(state, f"{layer}{unit}", parameter) for layer in ("out", "turn"))
        hidden = ((turn + slope) * key).sigmoid_()
        turn_gradient = out * hidden * (1 - hidden) * key * key  # of the inner loss m(key) key
        out.mul_(beta1).addcmul_(hidden, key, value=beta1 - 1)
        turn.mul_(beta1).add_(turn_gradient, alpha=beta1 - 1)
        change.addcmul_(out, ((turn + slope) * key).sigmoid_(), value=-1)
    return change.mul_(-group["lr"])


def initial_slopes(hidden: int) -> list[float]:
    """Initial weights of the first layer: one unit a sign and size of gradient, from -1 to 1; a lone unit is linear."""
    return [2 * unit / (hidden - 1) - 1 for unit in range(hidden)] if hidden > 1 else [0.0]
