"""Update rules that a level can move by: each maps a gradient to the change of its parameter.

A component keeps its own entries in `state` (one dict a parameter) and reads its settings from the parameter group. It
works elementwise, so it gives the same result on a parameter and on any shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Component = Callable[[Tensor, Tensor, State, dict[str, Any]], Tensor]


def adamw(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """AdamW (Loshchilov & Hutter 2019); `state["updates"]` counts from 1 and corrects the bias of both averages."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    mean = state["exp_avg"] / (1 - beta1 ** state["updates"])
    root = (state["exp_avg_sq"] / (1 - beta2 ** state["updates"])).sqrt_().add_(group["eps"])
    return mean.div_(root).add_(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])


def sgd(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Gradient descent with momentum `group["momentum"]` and decoupled weight decay."""
    if group["momentum"]:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = state["momentum"].mul_(group["momentum"]).add_(gradient)
    return gradient.add(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])


COMPONENTS: dict[str, Component] = {"adamw": adamw, "sgd": sgd}
