"""Delta rules for optimizers: a momentum that erases (Eq. 48-49), and Delta Gradient Descent over a layer's inputs.

Delta Gradient Descent (arXiv:2512.24695, Eq. 56-57) needs the inputs of a linear layer. `watch_inputs` puts a term into
the layer's backward pass that makes `weight.grad` the rule's own direction, so that accumulation, averaging over ranks,
clipping and sharding treat it like any gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.optim.matrices import Whole
from nestling.optim.rules import State, buffer


def delta_momentum(parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], whole: Whole) -> Tensor:
    """m = m (alpha I - eta' g^T g) - eta g, W = W + m, eta' = eta / (1 + eta |g|_F^2) (arXiv:2512.24695, Eq. 49).

    The printed eta' is 1, which has no scale. A vector is a matrix of one row: its gradient is the key.
    """
    momentum, rate, alpha = buffer(state, "momentum", parameter), group["lr"], group["momentum"]

    def erased(m: Tensor, g: Tensor) -> Tensor:
        erase = rate / (1 + rate * g.square().sum((-2, -1), keepdim=True))
        along = (m @ g.mT) @ g if g.shape[-2] <= g.shape[-1] else m @ (g.mT @ g)
        return alpha * m - erase * along

    momentum.copy_(whole(parameter, erased, momentum, gradient)).sub_(gradient, alpha=rate)
    return momentum.sub(parameter, alpha=rate * group["weight_decay"])


class InputWatch:
    """What is known of a watched parameter: whether its layer takes part, and the group that moves it."""

    def __init__(self, layer: str | None) -> None:
        #: Name of the linear layer; None for any other parameter, which moves by plain gradient descent.
        self.layer = layer
        #: Parameter group of Delta Gradient Descent; None: moved by another rule, and nothing is added.
        self.group: dict[str, Any] | None = None
        #: Weight of the erasing term relative to the mean over inputs, see `watch_inputs`.
        self.scale = 1.0
        self.mean = True
        self._added = False

    def rate(self) -> float:
        assert self.group is not None
        return float(self.group["lr"])

    def check(self, gradient: Tensor) -> None:
        """Called with every gradient of the parameter: it must have come with the erasing term."""
        added, self._added = self._added, False
        if self.group is not None and not added:
            raise RuntimeError(
                f"delta_gradient_descent: the weight of layer {self.layer!r} got a gradient that has not gone through "
                "the layer's own forward pass, needs layer(x), not a product with layer.weight; "
                "or give the layer another optimizer"
            )

    def mark(self) -> None:
        self._added = True


def watch_inputs(model: nn.Module, *, mean: bool = True, accumulation: int = 1) -> None:
    """Let `DeltaGradientDescent` see the inputs of all linear layers of a model; call it before making the optimizer.

    A weight's gradient becomes `sum_n c_n (s W x_n + delta_n) x_n^T`, `c_n = 1 / (1 + eta |x_n|^2)`, over the inputs
    x_n (N of them) of a forward pass, with delta_n as backpropagation brings it and eta the learning rate then.

    Args:
        model: its linear layers' weights are watched; nothing changes for weights that other rules move.
        mean: the loss is a mean over the inputs, so the erasing term is one too (s = 1/N: the step is the mean of the
            single inputs' steps, whatever their number); False: the loss is a sum (s = 1: the sum of those steps).
        accumulation: passes over which a loss is divided before `backward`; s is divided by it as well.
    """
    for name, module in model.named_modules():
        for place, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and place == "weight" and parameter.requires_grad
            watch = getattr(parameter, "input_watch", None)
            if watch is None or (linear and watch.layer is None):  # a tied weight may come as an embedding first
                watch = parameter.input_watch = InputWatch(name if linear else None)
                if linear:
                    module.register_forward_hook(_add_term)
                    parameter.register_hook(watch.check)
            watch.mean, watch.scale = mean, 1 / accumulation


def bind(group: dict[str, Any]) -> None:
    """Make a group of Delta Gradient Descent the one that its watched weights take their learning rate from.

    Raises:
        ValueError: a matrix that `watch_inputs` has not seen.
    """
    release(group)
    for parameter in group["params"]:
        watch = getattr(parameter, "input_watch", None)
        if not group["matrix"] or (watch is None and parameter.dim() < 2):
            continue
        if watch is None:
            raise ValueError(
                f"delta_gradient_descent: got a matrix of shape {tuple(parameter.shape)} whose inputs nobody watches, "
                "needs nestling.optim.watch_inputs(model) before the optimizer is made; or put it in a group with "
                "matrix=False, to move by plain gradient descent"
            )
        watch.group = group


def release(group: dict[str, Any]) -> None:
    """Parameters that another rule moves now get their plain gradients again."""
    for parameter in group["params"]:
        if hasattr(parameter, "input_watch"):
            parameter.input_watch.group = None


def _add_term(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    weight: Any = module.weight
    watch: InputWatch | None = getattr(weight, "input_watch", None)
    if watch is None or watch.group is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    term: Tensor = _DeltaTerm.apply(output, inputs[0], weight, watch)
    return term


class _DeltaTerm(torch.autograd.Function):
    """The identity on a layer's output; to the weight's gradient it adds what Eq. 57 has and plain descent has not."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Tensor, watch: InputWatch) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.watch = watch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (gradient,), (inputs, weight), watch = gradients, ctx.saved_tensors, ctx.watch
        dtype = torch.promote_types(weight.dtype, torch.float32)
        x, delta, w = (tensor.to(dtype).reshape(-1, tensor.shape[-1]) for tensor in (inputs, gradient, weight))
        share = watch.scale / (len(x) if watch.mean else 1)
        step = 1 / (1 + watch.rate() * x.square().sum(-1, keepdim=True))
        term = (F.linear(x, w) * share + delta) * step - delta
        watch.mark()
        return gradient, None, (term.mT @ x).to(weight.dtype), None
