"""What a level learns from inside a sequence: the error component f of arXiv:2512.24695, Eq. 71, by its source.

`task` is the gradient of the next-token loss (the level as a part of the model that predicts). `local` takes each
linear layer of a level as an associative memory of its own, which maps its inputs to the negative gradients at its
outputs (Delta Gradient Descent, Eq. 56-57): what the layer answers now is part of its error, and is so erased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nestling.memory.checks import state_dtype

#: Weights of one level by parameter name, one a row: (B, *shape of the parameter).
Weights = dict[str, Tensor]
#: The gradients of a block's summed loss at these tensors.
GradientsAt = Callable[[list[Tensor]], Iterable[Tensor]]


class Reading(NamedTuple):
    """One pass over a block of tokens: the weights of each level as this pass, and no other, has used them; logits
    (B, T, V); the model's state after it; and, by weight, inputs (B, T, in) and outputs (B, T, out) of level layers."""

    weights: list[Weights]
    logits: Tensor
    after: Any
    layers: dict[str, tuple[Tensor, Tensor]]


def read_block(model: nn.Module, levels: Sequence[Weights], tokens: Tensor, state: Any, watch: bool) -> Reading:
    """Read tokens (B, T) with the levels' own weights; with `watch`, note what goes through their linear layers."""
    parameters = dict(model.named_parameters())
    # A new tensor for each block: its gradient is of this block alone, while the graph reaches back to the weights.
    used = [{name: w.to(parameters[name].dtype).view_as(w) for name, w in weights.items()} for weights in levels]
    if torch.is_grad_enabled():
        for weights in used:
            for weight in weights.values():
                weight.requires_grad_()
    substitute = {name: weight for weights in used for name, weight in weights.items()}
    with _watched(model, substitute if watch else {}) as layers:
        logits, after = functional_call(model, substitute, (tokens, state))
    return Reading(used, logits, after, layers)


@contextmanager
def _watched(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: layers.update({name: (inputs[0], output)})

    handles = [modules[name].register_forward_hook(hook(name)) for name in weights if name in modules]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def task(gradients_at: GradientsAt, reading: Reading, rates: Sequence[float]) -> list[Weights]:
    """The gradient of the loss."""
    places = [weight for weights in reading.weights for weight in weights.values()]
    gradients = iter(gradients_at(places))
    return [{name: next(gradients) for name in weights} for weights in reading.weights]


def local(gradients_at: GradientsAt, reading: Reading, rates: Sequence[float]) -> list[Weights]:
    """Delta Gradient Descent in each linear layer W z = y of a level with rate eta, plain gradients elsewhere.

    sum_t (delta_t + y_t) z_t^T / (1 + eta |z_t|^2), with delta_t the loss's gradient at y_t: for one token, exactly the
    proximal step of Eq. 56, with the layer's own value -delta_t (Eq. 58).
    """
    layers = reading.layers
    places = [layers[n][1] if n in layers else w for weights in reading.weights for n, w in weights.items()]
    gradients = iter(gradients_at(places))
    errors = []
    for weights, rate in zip(reading.weights, rates, strict=True):
        level = {}
        for name in weights:
            gradient = next(gradients)
            if name in layers:
                inputs, outputs = layers[name]
                seen = (gradient + outputs) / (1 + rate * inputs.square().sum(-1, keepdim=True))
                gradient = seen.mT @ inputs
            level[name] = gradient
        errors.append(level)
    return errors


#: Each maps a block's gradients, its reading and the levels' rates to the sum of the errors over its tokens.
ERRORS: dict[str, Callable[[GradientsAt, Reading, Sequence[float]], list[Weights]]] = {"task": task, "local": local}


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the nats of `targets` (B, T) under `logits` (B, T, V), in float32 or wider."""
    wide = logits.to(state_dtype(logits.dtype))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")
