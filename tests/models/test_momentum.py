"""One layer with momentum: the closed form over a block equals its token loop, and the loop the written equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nestling.memory.momentum import MomentumGates, learn_with_momentum
from nestling.memory.reference import momentum_step, mv

torch.set_num_threads(1)
TENSORS = ("weights", "momentum", "base", "keys", "deltas", "step", "queries", "log_alpha", "log_mu")
READER = 2


def layer(shape: tuple[int, ...], tokens: int, n: int, seed: int = 0, own_keys: bool = False) -> dict[str, Tensor]:
    """Tensors of a layer with weights (*shape, n); with five axes the third counts memories, with keys of their own."""
    draw = torch.Generator().manual_seed(seed)
    batch = shape[:-1]
    shared = (*batch[:2], *[1] * (len(batch) - 2))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw, dtype=torch.float64)

    readers = batch if len(batch) == 2 else (*batch[:2], batch[2] - READER)
    tensors = {
        "weights": normal(*shape, n),
        "momentum": 0.3 * normal(*shape, n),
        "base": normal(*shape, n),
        "keys": normal(*batch, n, tokens) * n**-0.5,
        "deltas": normal(*shape, tokens),
        "step": 0.4 * uniform(*batch, 1, tokens),
        "queries": normal(*readers, n, tokens),
        "log_alpha": -0.3 * uniform(*shared, 1, tokens),
        "log_mu": -0.5 * uniform(*shared, 1, tokens),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def loop(
    t: dict[str, Tensor], erase: bool, inclusive: bool, based: bool, reader: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    weights, momentum, outputs = t["weights"], t["momentum"], []
    shape = t["weights"].shape[:-2]
    for i in range(t["keys"].shape[-1]):
        before = weights
        alpha, eta, mu = (
            gate[..., 0, i].expand(shape) for gate in (t["log_alpha"].exp(), t["step"], t["log_mu"].exp())
        )
        base = t["base"] if based else 0.0
        z, delta = t["keys"][..., i], t["deltas"][..., i]
        weights, momentum = momentum_step(before, momentum, z, delta, alpha, eta, mu, base, erase)
        outputs.append(mv((weights if inclusive else before)[:, :, reader:], t["queries"][..., i]))
    return weights, momentum, torch.stack(outputs, dim=-1)


def closed(
    t: dict[str, Tensor], erase: bool, inclusive: bool, based: bool, reader: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    gates = MomentumGates(*(t[name].squeeze(2) if t[name].dim() == 5 else t[name] for name in ("log_alpha", "log_mu")))
    return learn_with_momentum(
        t["weights"],
        t["momentum"],
        t["base"] if based else None,
        t["keys"],
        t["deltas"],
        t["step"],
        t["queries"],
        gates.unsqueeze(2) if t["weights"].dim() == 5 else gates,
        erase,
        inclusive,
        reader,
    )


def with_gradients(results: tuple, tensors: dict[str, Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(9)
    loss = sum((r * torch.randn(r.shape, generator=draw, dtype=torch.float64)).sum() for r in results)
    found = torch.autograd.grad(loss, [tensors[name] for name in TENSORS], allow_unused=True)
    return [*results, *(torch.zeros(1) if grad is None else grad for grad in found)]


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for name, left, right in zip(("weights", "momentum", "outputs", *TENSORS), got, expected, strict=True):
        error, size = (left - right).norm(), right.norm()
        assert error <= tolerance * size + 1e-13, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


@pytest.mark.parametrize(("erase", "inclusive", "based"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize(("shape", "reader", "tokens"), [((2, 2, 5), 0, 40), ((1, 2, 6), 2, 1), ((2, 1, 3, 4), 2, 33)])
def test_the_closed_form_equals_the_token_loop(shape, reader, tokens, erase, inclusive, based):
    tensors = layer(shape, tokens, n=4)
    expected = with_gradients(loop(tensors, erase, inclusive, based, reader), tensors)
    assert_equal(with_gradients(closed(tensors, erase, inclusive, based, reader), tensors), expected)


@pytest.mark.parametrize("gate", ["log_alpha", "log_mu"])
@pytest.mark.parametrize("value", [-torch.inf, -800.0, -45.0, 0.0])
def test_gates_may_be_shut_or_open(gate, value):
    tensors = layer((1, 2, 3), 40, n=4)
    changed = tensors[gate].detach().clone()
    changed[..., ::3] = value
    tensors[gate] = changed.requires_grad_()
    expected = with_gradients(loop(tensors, True, False, True, 0), tensors)
    assert_equal(with_gradients(closed(tensors, True, False, True, 0), tensors), expected)


def test_the_step_is_the_written_formula():
    t = {name: tensor.detach()[0, 0] for name, tensor in layer((1, 1, 3), 1, n=4).items()}
    z, delta, alpha, mu = t["keys"], t["deltas"], t["log_alpha"].exp(), t["log_mu"].exp()
    momentum = mu * t["momentum"] + delta @ z.mT
    weights = alpha * t["weights"] - t["step"] * (t["weights"] @ z @ z.mT) - t["step"] * momentum
    tensors = layer((1, 1, 3), 1, n=4)
    end, end_momentum, read = closed(tensors, True, True, False, 0)
    torch.testing.assert_close(end[0, 0], weights)
    torch.testing.assert_close(end_momentum[0, 0], momentum)
    torch.testing.assert_close(read[0, 0], weights @ t["queries"])


def test_float32_holds_with_shut_gates_and_a_long_block():
    """Sums of shut gates' logarithms have no digits left in float32 for the gates behind them."""
    tensors = layer((1, 2, 8), 64, n=8)
    with torch.no_grad():
        for name in ("log_alpha", "log_mu"):
            tensors[name][..., :20] = -torch.inf
    narrow = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    expected = with_gradients(loop(tensors, True, True, True, 0), tensors)
    got = with_gradients(closed(narrow, True, True, True, 0), narrow)
    assert_equal([t.double() for t in got], expected, tolerance=2e-5)
